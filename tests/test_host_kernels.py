"""Colab and Kaggle, imitated: another Python, the host's own torch and widgets, only the notebook opened beside a clone.

What a host brings is built from a package index: a torch of another version than the course's, ipywidgets 7.7.1, and
for Colab a `google.colab` module. Not imitated: the hosts' front ends, their GPUs and their other packages.
"""

import os
import shutil
import subprocess
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from optional_packages import absent
from test_notebooks import FOLDER, ROOT, STEMS, code_cells, printed, read, write_few_rows

TORCH = "2.12.0"
COLAB_MODULE = '"""Stands in for Colab\'s own module."""\n'
COLAB = {"COLAB_RELEASE_TAG": "release-colab-external-images", "COLAB_GPU": ""}
KAGGLE = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_URL_BASE": "https://www.kaggle.com"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        os.environ.get("GLM4_REQUIRE_PACKAGES") != "1",
        reason="downloads 3 GB for each host; GLM4_REQUIRE_PACKAGES=1 runs it, as .ci/run does",
    ),
]


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
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
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

    unset = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "GLM4_HOME", "GLM4_PROFILE")
    kept = {name: value for name, value in os.environ.items() if name not in unset}
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        kernel_manager_class=HostKernel,
        resources={"metadata": {"path": str(work)}},
    )
    client.execute(env={**kept, **variables})


def test_notebooks_install_and_run_and_torch_stays(host):
    python, packages, work, _ = host
    setup, comparison = (read(FOLDER / f"{STEMS[number]}.ipynb") for number in (0, 4))
    alone = nbformat.v4.new_notebook(cells=code_cells(setup)[:1])
    with pytest.raises(CellExecutionError, match="Clone the course's repository"):
        run(host, alone)

    subprocess.run(["git", "clone", "--quiet", "--depth", "1", f"file://{ROOT}", "the course"], cwd=work, check=True)
    clone = work / "the course"
    write_few_rows(clone / "data", train=480, others=16)
    torch, widgets = files(packages, "torch"), files(packages, "ipywidgets")
    for notebook in (setup, comparison):
        run(host, notebook)
        assert "Warning" not in printed(notebook)
    assert torch and files(packages, "torch") == torch
    assert files(packages, "ipywidgets") == widgets
    assert f"torch {TORCH}" in printed(setup)
    assert (clone / "outputs" / "glm4-nano" / "before_after.json").is_file()
