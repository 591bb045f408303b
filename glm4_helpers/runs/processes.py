"""One run in several processes: who speaks, who decides, who writes, and who may use a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import broadcast_object_list

from ..errors import SettingError
from ..paths import shown


def join_processes() -> None:
    """Meet the other processes of `accelerate launch`. On a CPU each takes itself for the only one unless told so.

    Raises SettingError for several visible GPUs without a launcher: the trainer would divide each batch among them with
    DataParallel, which TRL refuses only after the model is loaded.
    """
    state = PartialState(cpu=not torch.cuda.is_available())
    count = torch.cuda.device_count()
    if count > 1 and state.distributed_type == DistributedType.NO:
        raise SettingError(
            f"{count} GPUs are visible, and a process trains on one.",
            "Show it one: put CUDA_VISIBLE_DEVICES=0 before the command, or set it at the top of the notebook, before "
            f"torch is imported. Or use all: accelerate launch --num_processes {count} -m glm4_helpers train ...",
        )


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
