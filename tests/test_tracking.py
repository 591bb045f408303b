"""SwanLab in each mode, in a process of its own with stdin closed and a time limit; then what it kept is read back."""

import json
import os
import shutil
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LOG = """
import json, sys
from types import SimpleNamespace
from glm4_helpers import tracking
from glm4_helpers.errors import CourseError

mode, folder = sys.argv[1:]
try:
    run = tracking.start_run(mode, name="test", directory=folder, config={"rate": 0.5})
except CourseError as error:
    print(error)
    sys.exit(2)
state = SimpleNamespace(is_world_process_zero=True, global_step=0)
callback = tracking.callback()
callback.on_train_begin(None, state, None)
for step, loss in ((10, 2.25), (20, 1.125)):
    state.global_step = step
    callback.on_log(None, state, None, logs={"loss": loss})
    answers = [{"question": "你好", "answer": f"第{step}步的回答", "stopped": True}]
    tracking.log_answers({"step": step, "stop_rate": 1.0, "answers": answers})
tracking.finish()
print(json.dumps(run.settings()))
"""

NO_NETWORK = ["unshare", "-rn"] if shutil.which("unshare") else []


def log(mode: str, folder: Path, prefix: list[str] = (), **variables: str) -> subprocess.CompletedProcess:
    """Log two losses and two answers in this mode, as a user without an account would."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
    environment |= {"HOME": str(folder), "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        [*prefix, sys.executable, "-c", LOG, mode, str(folder / "swanlog")],
        env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def scalars(run_folder: Path) -> dict[tuple[str, int], float]:
    """Numbers of a run by key and step. SwanLab has no public reader for its own files."""
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record
    from swanlab.sdk.internal.core_python.store import DataStoreReader

    found = {}
    for file in run_folder.glob("*.swanlab"):
        reader = DataStoreReader()
        reader.open(str(file))
        for data in reader:
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "scalar":
                found[record.scalar.key, record.scalar.step] = record.scalar.value.number
        reader.close()
    return found


def texts(run_folder: Path) -> set[str]:
    return {file.read_text(encoding="utf-8") for file in run_folder.glob("media/text/*.txt")}


def unreachable() -> list[str]:
    """A command prefix without any network; the test is skipped where the system does not allow that."""
    if not NO_NETWORK or subprocess.run([*NO_NETWORK, "true"], capture_output=True).returncode:
        pytest.skip("network namespaces are not allowed here")
    return NO_NETWORK


def test_offline_needs_neither_network_nor_account_and_keeps_losses_and_texts(tmp_path):
    done = log("offline", tmp_path, unreachable())
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)  # and nothing else was printed
    folder = Path(run["folder"])
    assert folder.parent == tmp_path / "swanlog"
    found = scalars(folder)
    assert (found["train/loss", 10], found["train/loss", 20]) == (2.25, 1.125)
    assert found["dev/stop_rate", 20] == 1.0
    assert texts(folder) == {"你好\n\n第10步的回答", "你好\n\n第20步的回答"}
    kept = "".join(path.read_text(encoding="utf-8") for path in (folder / "files").iterdir())
    assert socket.gethostname() not in kept and "git_remote" not in kept


def test_disabled_writes_nothing(tmp_path):
    done = log("disabled", tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "swanlog").glob("run-*"))


def test_local_feeds_the_dashboard_or_says_what_to_install(tmp_path):
    done = log("local", tmp_path)
    if find_spec("swanboard") is None:
        assert done.returncode == 2 and 'pip install "swanlab[dashboard]"' in done.stdout
    else:
        assert done.returncode == 0, done.stderr
        assert texts(Path(json.loads(done.stdout.splitlines()[-1])["folder"]))


def test_cloud_without_a_key_is_an_error_and_not_a_prompt(tmp_path):
    done = log("cloud", tmp_path)
    assert done.returncode == 2 and "swanlab login" in done.stdout


def test_cloud_with_a_key_but_no_network_is_an_error(tmp_path):
    done = log("cloud", tmp_path, unreachable(), SWANLAB_API_KEY="0123456789abcdefghijk")
    assert done.returncode == 2 and "swanlab sync" in done.stdout


def test_a_variable_that_swanlab_can_not_read_is_named(tmp_path):
    done = log("offline", tmp_path, SWANLAB_PROJECT="mine")
    assert done.returncode == 2 and "SWANLAB_PROJ_NAME" in done.stdout


def test_an_unknown_mode_is_named():
    from glm4_helpers import tracking
    from glm4_helpers.errors import SettingError

    with pytest.raises(SettingError, match="'online'"):
        tracking.start_run("online")
