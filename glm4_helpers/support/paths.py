"""Where weights, data and outputs are.

Nothing is read or downloaded here; the only folder ever created is outputs/.
"""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CourseError, SettingError

CHECKPOINTS = "checkpoints"
"""The folder of a run's checkpoints, next to its adapter."""
RUN_FILE, TRAINING_FILE = "run.json", "training.json"
"""What a run was made from: in the folder of its checkpoints, and with its figures in that of the finished adapter."""


def home() -> Path:
    """The course folder: GLM4_HOME, else the nearest folder upward that holds glm4_helpers/ and weights/.

    Raises SettingError where GLM4_HOME names no folder, CourseError where no course folder is found.
    """
    chosen = os.environ.get("GLM4_HOME")
    if chosen:
        return _chosen_home(chosen)
    here = Path.cwd().resolve()
    for folder in (here, *here.parents):
        if (folder / "glm4_helpers").is_dir() and (folder / "weights").is_dir():
            return folder
    raise CourseError(
        f"The course folder (with glm4_helpers/ and weights/) was not found in {here} or above it.",
        "Clone the repository and work inside it, or set GLM4_HOME to the folder of the clone.",
    )


def data_dir() -> Path:
    """The folder data/ of the course."""
    return home() / "data"


def weights_dir(name: str) -> Path:
    """The folder weights/NAME, whether it is there yet or not."""
    return home() / "weights" / name


def outputs_dir(*parts: str) -> Path:
    """The folder outputs/, or one inside it; created if absent."""
    folder = home().joinpath("outputs", *parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CourseError(
            f"The folder {folder} can't be created: {error.strerror}.",
            "Free the name or make the folder writable, or set GLM4_HOME to a folder that you may write to.",
        ) from error
    return folder


def shown(path: Path) -> str:
    """A path as it reads in a message: relative to the course folder where it lies inside."""
    try:
        return path.resolve().relative_to(home()).as_posix()
    except (CourseError, ValueError):
        return str(path)


def share_weights(folder: Path) -> None:
    """Give weights the permissions that new files have: safetensors writes them for their owner alone."""
    probe = folder / ".permissions"
    probe.touch()
    mode = probe.stat().st_mode
    probe.unlink()
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _chosen_home(chosen: str) -> Path:
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        raise SettingError(
            f"GLM4_HOME is {chosen!r}, which is not a folder.",
            "Set GLM4_HOME to the folder of the cloned repository, or unset it.",
        )
    return folder.resolve()
