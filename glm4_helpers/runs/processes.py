"""One run in several processes: who speaks, who decides, who writes, and who may use a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..machine.gpus import use_one_gpu
from ..support.errors import SettingError
from ..support.paths import shown


def join_processes() -> None:
    """Meet the other processes of `accelerate launch`. On a CPU each takes itself for the only one unless told so.

    Of several visible GPUs a process without a launcher keeps one, see `use_one_gpu`, which may raise SettingError.
    """
    use_one_gpu()
    PartialState(cpu=not torch.cuda.is_available())


def say(text: str) -> None:
    """Print a line, once for all processes; nothing for an empty text."""
    if text and PartialState().is_main_process:
        print(text, flush=True)


def shared(decide: Callable[[], Any]) -> Any:
    """What the main process decides, in every process."""
    return broadcast_object_list([decide() if PartialState().is_main_process else None])[0]


def on_main(act: Callable[[], Any]) -> None:
    """Act in the main process while the others wait."""
    if PartialState().is_main_process:
        act()
    PartialState().wait_for_everyone()


@contextmanager
def sole_use(output: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, in whatever way.

    Raises SettingError where the folder can't be created or another process holds the lock.
    """
    from filelock import FileLock, Timeout

    if not PartialState().is_main_process:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"The output folder {output} can't be created: {error.strerror}.",
            "Choose another one (--output, output_dir).",
        ) from error
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingError(
            f"Another process is training into {shown(output)}.",
            "Wait until it is done or stop it; or choose another folder (--output, output_dir).",
        ) from None
    try:
        yield
    finally:
        lock.release()
