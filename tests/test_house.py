"""The house: packaging, pinned versions, make targets and what git ignores."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from optional_packages import absent
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONSTRAINTS = [
    Requirement(line)
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
]
TARGETS = ("course", "test", "lint", "lab", "notebooks", "screenshots", "bench")

needs_make = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed (Windows)")
needs_git = pytest.mark.skipif(
    not shutil.which("git") or not (ROOT / ".git").exists(), reason="not a clone, or git is not installed"
)


def pinned() -> dict[str, str]:
    return {canonicalize_name(line.name): next(iter(line.specifier)).version for line in CONSTRAINTS}


def test_every_constraint_is_one_exact_public_version():
    for line in CONSTRAINTS:
        assert [specifier.operator for specifier in line.specifier] == ["=="], line
        assert "+" not in str(line.specifier), f"{line}: a local build exists on one machine only"


def test_torch_is_the_version_the_course_was_tested_with():
    assert pinned()["torch"] == "2.13.0"


def test_no_constraint_is_for_one_platform_only():
    assert not [name for name in pinned() if re.match(r"nvidia-(?!ml-py)|triton|appnope|pywin|colorama", name)]


@pytest.mark.parametrize("line", [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]])
def test_every_requirement_is_pinned_within_its_range(line):
    requirement = Requirement(line)
    assert requirement.specifier.contains(pinned()[canonicalize_name(requirement.name)])


def test_the_installed_packages_are_the_pinned_ones():
    """Where `make` installed: the requirements of the requirements must be pinned too, or installs drift apart."""
    from importlib.metadata import distributions

    installed = {canonicalize_name(found.metadata["Name"]): found.version for found in distributions()}
    versions = pinned()
    if any(installed.get(name, "").split("+")[0] != versions[name] for name in ("torch", "transformers", "trl")):
        absent("another environment than the one that make sets up")
    found = {name: installed[name].split("+")[0] for name in versions if name in installed}
    assert {name: version for name, version in found.items() if version != versions[name]} == {}


@pytest.mark.parametrize("version", ["2.6.0", "2.8.0+cu126", "2.13.0+cpu"])
def test_a_host_keeps_its_own_torch(version):
    torch = next(Requirement(line) for line in PROJECT["dependencies"] if line.startswith("torch"))
    assert torch.specifier.contains(version)


def test_extras_cover_what_only_some_profiles_and_people_need():
    assert {"dashboard", "deepspeed", "bitsandbytes", "modelscope", "evaluation", "test"} <= set(
        PROJECT["optional-dependencies"]
    )


def test_conda_environment_installs_the_package_last():
    import yaml

    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    assert environment["dependencies"][-1] == {"pip": ["-e ."]}


@pytest.fixture
def copy_with_spaces(tmp_path) -> Path:
    """What make needs of the repository, in a folder whose path has spaces."""
    folder = tmp_path / "my course, v 2"
    (folder / ".ci").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", ".ci/install"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def make(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # The tests may themselves run under make, with variables of its own.
    outer = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    outer = {name: value for name, value in outer.items() if name not in ("PYTHON", "TORCH_INDEX", "PYTEST")}
    return subprocess.run(
        ["make", *arguments], cwd=folder, env={**outer, **environment}, capture_output=True, text=True, timeout=60
    )


@needs_make
@pytest.mark.parametrize("target", TARGETS)
def test_each_target_installs_first_and_only_once(copy_with_spaces, target):
    first = make(copy_with_spaces, "-n", target)
    assert first.returncode == 0, first.stderr
    assert ".ci/install" in first.stdout.splitlines()[0]
    (copy_with_spaces / ".venv").mkdir()
    (copy_with_spaces / ".venv" / "installed").touch()
    second = make(copy_with_spaces, "-n", target)
    assert second.returncode == 0, second.stderr
    assert "install" not in second.stdout and "pip" not in second.stdout
    assert ".venv/bin/python" in second.stdout


@needs_make
@pytest.mark.parametrize(("user", "allowed"), [(0, True), (1000, False)])
def test_lab_starts_as_root_too(copy_with_spaces, tmp_path, user, allowed):
    (tmp_path / "id").write_text(f"#!/bin/sh\necho {user}\n", encoding="utf-8")
    (tmp_path / "id").chmod(0o755)
    shown = make(copy_with_spaces, "-n", "lab", PATH=os.pathsep.join([str(tmp_path), os.environ["PATH"]])).stdout
    assert "jupyter lab notebooks" in shown and ("--allow-root" in shown) == allowed


@needs_make
@pytest.mark.parametrize("changed", ["pyproject.toml", "constraints.txt"])
def test_a_change_of_versions_installs_again(copy_with_spaces, changed):
    stamp = copy_with_spaces / ".venv" / "installed"
    stamp.parent.mkdir()
    stamp.touch()
    later = stamp.stat().st_mtime + 10
    os.utime(copy_with_spaces / changed, (later, later))
    assert ".ci/install" in make(copy_with_spaces, "-n", "test").stdout


@pytest.fixture
def recorded_install(copy_with_spaces, tmp_path) -> tuple[Path, Path, Path]:
    """The copy, a stand-in for Python that makes a .venv of stand-ins, and the log of what pip was asked."""
    log = tmp_path / "pip.log"
    stand_in = tmp_path / "a python"
    stand_in.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "  --version) echo Python 3.12.0 ;;\n"
        "  -c) exit 0 ;;\n"
        '  -m) if [ "$2" = venv ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; else shift 2; echo "$@" >> '
        f"'{log}'; fi ;;\n"
        "esac\n"
    )
    stand_in.chmod(0o755)
    return copy_with_spaces, stand_in, log


@needs_make
def test_install_uses_the_constraints_and_nothing_the_second_time(recorded_install):
    folder, python, log = recorded_install
    first = make(folder, "install", f"PYTHON={python}")
    assert first.returncode == 0, first.stderr
    asked = log.read_text().splitlines()
    course, *apart = asked  # on Linux a second call puts DeepSpeed and bitsandbytes into a folder of their own
    assert "--constraint constraints.txt --editable .[test]" in course
    assert all("--no-deps --constraint constraints.txt --target .venv/" in call for call in apart)
    assert make(folder, "install").returncode == 0
    assert log.read_text().splitlines() == asked


@needs_make
@pytest.mark.parametrize(
    ("index", "address"),
    [
        ("cpu", "https://download.pytorch.org/whl/cpu"),
        ("cu128", "https://download.pytorch.org/whl/cu128"),
        ("https://mirror.example/whl", "https://mirror.example/whl"),
    ],
)
def test_torch_can_come_from_another_index_alone(recorded_install, index, address):
    folder, python, log = recorded_install
    # Given as a variable of the environment or of make, it is the same.
    assert make(folder, "install", f"PYTHON={python}", TORCH_INDEX=index).returncode == 0
    torch, *rest = log.read_text().splitlines()
    assert torch.endswith("torch") and f"--index-url {address}" in torch and "--constraint constraints.txt" in torch
    assert rest and not any("index-url" in call for call in rest)


@needs_make
def test_without_a_usable_python_make_says_what_to_do(copy_with_spaces):
    finished = make(copy_with_spaces, "install", "PYTHON=/no/such/python")
    assert finished.returncode != 0
    assert "Python 3.11" in finished.stderr and "Fix:" in finished.stderr
    assert not (copy_with_spaces / ".venv").exists()


@needs_make
def test_a_failed_install_is_tried_again(recorded_install):
    folder, python, _ = recorded_install
    python.write_text(python.read_text().replace("shift 2;", "exit 1;"))
    assert make(folder, "install", f"PYTHON={python}").returncode != 0
    assert not (folder / ".venv" / "installed").exists()


@pytest.mark.parametrize(("shell", "script"), [("sh", ".ci/install"), ("bash", ".ci/run")])
def test_scripts_parse(shell, script):
    if not shutil.which(shell):
        absent(f"{shell} is not installed")
    subprocess.run([shell, "-n", script], cwd=ROOT, check=True)


@needs_git
@pytest.mark.parametrize(
    ("path", "ignored"),
    [
        (".venv/bin/python", True),
        ("outputs/glm4-nano/adapter_model.safetensors", True),
        ("data/pretrain.txt", True),
        ("weights/glm-4-9b-hf/config.json", True),
        ("swanlog/run/swanlab-metadata.json", True),
        (".env", True),
        ("weights/glm4-nano/model.safetensors", False),
        ("data/train.json", False),
        ("data/test/unseen_rows.json", False),
        ("notebooks/01_environment_setup.ipynb", False),
    ],
)
def test_what_git_ignores(path, ignored):
    answer = subprocess.run(["git", "check-ignore", "--quiet", "--no-index", path], cwd=ROOT)
    assert (answer.returncode == 0) == ignored


def sources() -> dict[str, str]:
    """The Python of all that a user runs, by file: modules, scripts, and notebooks' cells without their magics."""
    folders = [ROOT / name for name in ("glm4_helpers", "nano", "benchmarks", "images", "notebooks")]
    found = {path: path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")}
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        found[path] = re.sub(r"(?m)^\s*[%!].*$", "", code)
    return {path.relative_to(ROOT).as_posix(): source for path, source in found.items()}


def names_no_encoding(call: ast.Call) -> bool:
    """Whether a call reads or writes text in the encoding that the system prefers."""
    name = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
    if name not in ("open", "read_text", "write_text") or ast.unparse(call.func) == "os.open":
        return False
    given = [*call.args, *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    binary = any(isinstance(value, ast.Constant) and value.value in ("rb", "wb", "ab", "r+b", "xb") for value in given)
    return not binary and not any(keyword.arg == "encoding" for keyword in call.keywords)


def test_every_text_file_is_read_and_written_with_a_named_encoding():
    nameless = [
        f"{path}:{node.lineno}"
        for path, source in sources().items()
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and names_no_encoding(node)
    ]
    assert nameless == []


def test_package_data_is_declared_for_what_is_not_python():
    package = ROOT / "glm4_helpers"
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    declared = tools["setuptools"]["package-data"]["glm4_helpers"]
    covered = {path for pattern in declared for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert others <= covered


def test_python_is_new_enough_for_the_course():
    assert sys.version_info >= tuple(int(part) for part in PROJECT["requires-python"].removeprefix(">=").split("."))
