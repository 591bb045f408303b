"""Colab and Kaggle, imitated: another Python, the host's own torch and widgets, a notebook opened beside a clone.

What a host brings is built from a package index: a torch of another version than the course's, ipywidgets 7.7.1, and
for Colab a `google.colab` module. Not imitated: the hosts' front ends, their GPUs and their other packages.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from optional_packages import absent
from test_notebooks import COURSE, ROOT, code_cells, printed, read, write_few_rows

TORCH = "2.12.0"
COLAB_MODULE = '"""Stands in for Colab\'s own module."""\n'
COLAB = {"COLAB_RELEASE_TAG": "release-colab-external-images", "COLAB_GPU": ""}
UNSET = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "GLM4_HOME", "GLM4_PROFILE")
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_URL_BASE": "https://www.kaggle.com"}

FIRST_CELL = code_cells(read(COURSE[0]))[0].source
# Stands in for pip: writes down what it was asked for, and gives what a test says it gives.
PIP = """
import pathlib, sys
packages = pathlib.Path(__file__).parents[1]
constraints = pathlib.Path(sys.argv[sys.argv.index("--constraint") + 1]).read_text(encoding="utf-8")
(packages / "asked.txt").write_text(f"{sys.argv[-1]}\\n{constraints}", encoding="utf-8")
for name in ("trl", "peft", "swanlab"):
    (packages / f"{name}.py").touch()
"""


# The first cell, in a Python without packages


@pytest.fixture
def bare(tmp_path):
    """A Python, its packages (a torch of the host's and a stand-in for pip), and an empty working folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    packages = next((tmp_path / "venv").glob("[Ll]ib*/**/site-packages"))
    (packages / "pip").mkdir()
    (packages / "pip" / "__main__.py").write_text(PIP, encoding="utf-8")
    bring(packages, "torch", "2.9.0+cu126")
    (tmp_path / "content").mkdir()
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    return python, packages, tmp_path / "content"


def bring(packages: Path, name: str, version: str) -> None:
    """An installed package, as far as its name and version go."""
    (packages / f"{name}.py").touch()
    info = packages / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n", encoding="utf-8")


def clone_beside(folder: Path) -> Path:
    clone = folder / "the course"
    for name in (
        "notebooks/start.py",
        "glm4_helpers/__init__.py",
        "glm4_helpers/support/__init__.py",
        "glm4_helpers/support/errors.py",
    ):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    return clone


def run_first_cell(python: Path, folder: Path, before: str = "") -> subprocess.CompletedProcess:
    after = "import glm4_helpers; print(os.environ['GLM4_HOME'])"
    variables = {name: value for name, value in os.environ.items() if name not in UNSET}
    code = "\n".join((before, FIRST_CELL, after))
    return subprocess.run([python, "-c", code], cwd=folder, env=variables, capture_output=True, encoding="utf-8")


def test_first_cell_asks_for_a_clone(bare):
    python, _, folder = bare
    finished = run_first_cell(python, folder)
    assert finished.returncode != 0 and "Clone the course's repository" in finished.stderr


@pytest.mark.parametrize("inside", [".", "the course", "the course/notebooks", "the course/notebooks/solutions"])
def test_first_cell_installs_what_is_missing_once_and_keeps_torch(bare, inside):
    python, packages, folder = bare
    clone = clone_beside(folder)
    (clone / "notebooks" / "solutions").mkdir()
    finished = run_first_cell(python, folder / inside)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == str(clone)
    assert (packages / "asked.txt").read_text(encoding="utf-8").splitlines() == [str(clone), "torch==2.9.0+cu126"]
    (packages / "asked.txt").unlink()
    assert run_first_cell(python, folder / inside).stdout == f"{clone}\n"
    assert not (packages / "asked.txt").exists()


def test_first_cell_says_why_nothing_was_installed(bare):
    python, packages, folder = bare
    clone_beside(folder)
    reason = "ERROR: No matching distribution found for trl"
    (packages / "pip" / "__main__.py").write_text(f"raise SystemExit({reason!r})", encoding="utf-8")
    finished = run_first_cell(python, folder)
    assert finished.returncode != 0
    assert f"pip could not install the course's packages. {reason}" in finished.stderr and "network" in finished.stderr


def test_first_cell_asks_for_a_restart_where_a_package_in_use_was_replaced(bare):
    python, packages, folder = bare
    clone_beside(folder)
    bring(packages, "numpy", "1.26.4")
    replace = "(packages / 'numpy-1.26.4.dist-info').rename(packages / 'numpy-2.4.0.dist-info')\n"
    replace += "(packages / 'numpy-2.4.0.dist-info' / 'METADATA').write_text('Name: numpy\\nVersion: 2.4.0\\n')"
    (packages / "pip" / "__main__.py").write_text(PIP + replace, encoding="utf-8")
    finished = run_first_cell(python, folder, before="import numpy")
    assert finished.returncode != 0
    assert "using: numpy" in finished.stderr and "Restart the kernel" in finished.stderr


# Whole notebooks, in a host's Python


@pytest.fixture(scope="module", params=[("3.12", "colab", COLAB), ("3.13", "kaggle", KAGGLE)], ids=lambda host: host[1])
def host(request, tmp_path_factory):
    """A host's Python with what it brings, its working folder with a fresh clone, and the variables it sets."""
    version, name, variables = request.param
    folder = tmp_path_factory.mktemp(name)
    subprocess.run([python_of(version), "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--no-compile"]
    brings = [f"torch=={TORCH}", "numpy<2.4", "pandas<3", "ipykernel<7", "ipywidgets==7.7.1"]
    subprocess.run([*pip, *brings], check=True)
    packages = next((folder / "venv" / "lib").glob("python*/site-packages"))
    if name == "colab":
        (packages / "google" / "colab").mkdir(parents=True)
        (packages / "google" / "colab" / "__init__.py").write_text(COLAB_MODULE, encoding="utf-8")
    work = folder / "content"
    work.mkdir()
    yield python, packages, work, variables
    shutil.rmtree(folder)  # more than 5 GB


def python_of(version: str) -> str:
    """A Python of this version: on PATH, or among pyenv's."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    places = [shutil.which(f"python{version}"), *pyenv.glob(f"versions/{version}.*/bin/python")]
    for place in filter(None, places):
        if subprocess.run([place, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0:
            return str(place)
    return absent(f"Python {version} is not installed")


def files(packages: Path, name: str) -> dict:
    """Every file of an installed package, with its size and time of change."""
    found = [path for folder in packages.glob(f"{name}*") for path in folder.rglob("*")]
    stats = {path: path.stat() for path in found if path.is_file() and path.suffix != ".pyc"}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def run(host, notebook):
    """Run a notebook that was opened in the host's working folder."""
    python, _, work, variables = host

    class HostKernel(AsyncKernelManager):
        def format_kernel_cmd(self, extra_arguments=None):
            return [str(python), "-m", "ipykernel_launcher", "--log-level=ERROR", "-f", self.connection_file]

    kept = {name: value for name, value in os.environ.items() if name not in UNSET}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        kernel_manager_class=HostKernel,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute(env={**kept, **variables})


@pytest.mark.slow
@pytest.mark.skipif(
    os.environ.get("GLM4_REQUIRE_PACKAGES") != "1",
    reason="downloads 3 GB for each host; GLM4_REQUIRE_PACKAGES=1 runs it, as .ci/run does",
)
def test_notebooks_install_and_run_and_torch_stays(host):
    python, packages, work, _ = host
    setup, comparison = read(COURSE[0]), read(COURSE[-1])
    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", "the course"], cwd=work, check=True)
    clone = work / "the course"
    torch, widgets = files(packages, "torch"), files(packages, "ipywidgets")
    run(host, setup)
    write_few_rows(clone / "data", train=480, others=16)  # notebook 06 trains first, since no adapter is there
    run(host, comparison)
    assert "Warning" not in printed(setup) + printed(comparison)
    assert torch and files(packages, "torch") == torch
    assert files(packages, "ipywidgets") == widgets
    assert f"torch {TORCH}" in printed(setup)
    assert (clone / "outputs" / "glm4-nano" / "before_after.json").is_file()
