"""Paths: the course folder is found from anywhere inside a clone, or said to be absent."""

import pytest

from glm4_helpers.support import paths
from glm4_helpers.support.errors import CourseError, SettingError


@pytest.fixture
def clone(tmp_path):
    folder = tmp_path / "a clone"
    (folder / "glm4_helpers").mkdir(parents=True)
    (folder / "weights").mkdir()
    (folder / "notebooks" / "solutions").mkdir(parents=True)
    return folder.resolve()


@pytest.mark.parametrize("inside", [".", "notebooks", "notebooks/solutions"])
def test_home_is_found_upward(clone, monkeypatch, inside):
    monkeypatch.chdir(clone / inside)
    assert paths.home() == clone
    assert paths.data_dir() == clone / "data"
    assert paths.weights_dir("glm4-nano") == clone / "weights" / "glm4-nano"


def test_the_variable_wins(clone, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.chdir(clone)
    monkeypatch.setenv("GLM4_HOME", str(other))
    assert paths.home() == other.resolve()


def test_a_variable_that_names_no_folder_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "gone"))
    with pytest.raises(SettingError, match="GLM4_HOME is .*gone.*not a folder"):
        paths.home()


def test_outside_a_clone_the_error_says_to_clone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CourseError) as caught:
        paths.home()
    assert "Clone the repository" in caught.value.fix


def test_outputs_are_created_and_may_exist(clone, monkeypatch):
    monkeypatch.chdir(clone)
    folder = paths.outputs_dir("glm4-nano", "plots")
    assert folder.is_dir() and folder == clone / "outputs" / "glm4-nano" / "plots"
    assert paths.outputs_dir("glm4-nano", "plots") == folder


def test_a_file_in_the_way_of_outputs_is_said(clone, monkeypatch):
    (clone / "outputs").write_text("a file")
    monkeypatch.chdir(clone)
    with pytest.raises(CourseError, match="outputs.*can't be created"):
        paths.outputs_dir("run")
