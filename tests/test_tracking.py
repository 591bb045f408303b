"""SwanLab in each mode, in a process without a terminal and with a time limit; then what it kept is read back.

Each run's mode, network, seconds and outcome are printed when the tests are done.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from optional_packages import python_path

ROOT = Path(__file__).parent.parent
TITLE = "SwanLab without a prompt or a hang"
KEY = "0123456789abcdefghijk"

LOG = """
import json, sys
from types import SimpleNamespace
from glm4_helpers.runs import tracking
from glm4_helpers.support.errors import CourseError

mode, folder = sys.argv[1:]
try:
    run = tracking.start_run(mode, name="test", directory=folder, config={"rate": 0.5})
except CourseError as error:
    print(error)
    sys.exit(2)
state = SimpleNamespace(is_world_process_zero=True, global_step=0)
callback = tracking.tracking_callback()
callback.on_train_begin(None, state, None)
for step, loss in ((10, 2.25), (20, 1.125)):
    state.global_step = step
    callback.on_log(None, state, None, logs={"loss": loss})
    answers = [{"question": "你好", "answer": f"第{step}步的回答", "stopped": True}]
    tracking.log_answers({"step": step, "stop_rate": 1.0, "answers": answers})
tracking.finish_run()
print(json.dumps(run.settings()))
"""

NO_NETWORK = ["unshare", "-rn"] if shutil.which("unshare") else []


@pytest.fixture
def log(tmp_path, report):
    """Log two losses and two answers in a mode, as a user without an account would."""

    def run(
        mode: str, network: str = "as it is", prefix: list[str] = (), **variables: str
    ) -> subprocess.CompletedProcess:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SWANLAB_")}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT), **variables}
        started = time.monotonic()
        done = subprocess.run(
            [*prefix, sys.executable, "-c", LOG, mode, str(tmp_path / "swanlog")],
            env=environment,
            cwd=tmp_path,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=200,
            start_new_session=True,  # a prompt could else be read from the terminal that the tests were started in
        )
        said = done.stdout.rpartition("\nFix: ")[0].splitlines()[-1:] if done.returncode else ["logged"]
        report(TITLE, f"{mode:<9} network {network:<20}{time.monotonic() - started:4.0f} s  {''.join(said)[:110]}")
        return done

    return run


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


@contextmanager
def silent_server():
    """The address of a server that takes connections and never answers: what hangs where nothing limits the wait."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_offline_needs_neither_network_nor_account_and_keeps_losses_and_texts(log, tmp_path):
    done = log("offline", "none", unreachable())
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


def test_disabled_writes_nothing(log, tmp_path):
    done = log("disabled")
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "swanlog").glob("run-*"))


@contextmanager
def dashboard(folder: Path, path: str):
    """`swanlab watch` on the folder, as a user starts it; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("swanlab"), "watch", str(folder), "-h", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 60
        while time.monotonic() < until:  # it says "ready" before it listens
            try:
                ask(address, "project")
                break
            except OSError:
                time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.communicate(timeout=20)


def ask(address: str, what: str):
    with urllib.request.urlopen(f"{address}/api/v1/{what}", timeout=10) as reply:
        return json.load(reply)["data"]


def test_local_feeds_the_dashboard_which_shows_losses_and_texts(log, tmp_path):
    path = python_path("swanboard")
    done = log("local", PYTHONPATH=os.pathsep.join([str(ROOT), path]))
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout.splitlines()[-1])["folder"])
    assert texts(folder) == {"你好\n\n第10步的回答", "你好\n\n第20步的回答"}
    assert scalars(folder)["train/loss", 20] == 1.125
    with dashboard(tmp_path / "swanlog", path) as address:
        run = ask(address, "project")["experiments"][0]
        logged = {tag: ask(address, f"experiment/{run['id']}/tag/{tag}")["list"] for tag in ("train/loss", "answers")}
    assert run["name"] == "test"
    assert [(point["index"], point["data"]) for point in logged["train/loss"]] == [(10, 2.25), (20, 1.125)]
    assert [point["data"] for point in logged["answers"]] == [["你好\n\n第10步的回答"], ["你好\n\n第20步的回答"]]


def test_local_without_the_dashboard_says_what_to_install(monkeypatch):
    from glm4_helpers.runs import tracking
    from glm4_helpers.support.errors import MachineError

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MachineError, match="dashboard") as error:
        tracking.start_run("local")
    assert 'pip install "swanlab[dashboard]"' in error.value.fix


def test_cloud_without_a_key_is_an_error_and_not_a_prompt(log):
    done = log("cloud")
    assert done.returncode == 2 and "swanlab login" in done.stdout


def refused(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 2, done.stderr
    assert "SwanLab's cloud can't be used" in done.stdout and "swanlab sync" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_cloud_with_a_key_but_no_network_is_an_error(log):
    refused(log("cloud", "none", unreachable(), SWANLAB_API_KEY=KEY))


def test_cloud_that_refuses_connections_is_an_error(log):
    refused(log("cloud", "refuses connections", SWANLAB_API_KEY=KEY, SWANLAB_API_HOST="http://127.0.0.1:9"))


def test_cloud_that_never_answers_is_an_error(log):
    with silent_server() as address:
        refused(log("cloud", "never answers", SWANLAB_API_KEY=KEY, SWANLAB_API_HOST=address))


def test_a_variable_that_swanlab_can_not_read_is_named(log):
    done = log("offline", SWANLAB_PROJECT="mine")
    assert done.returncode == 2 and "SWANLAB_PROJ_NAME" in done.stdout


def test_an_unknown_mode_is_named():
    from glm4_helpers.runs import tracking
    from glm4_helpers.support.errors import SettingError

    with pytest.raises(SettingError, match="'online'"):
        tracking.start_run("online")
