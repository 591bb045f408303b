"""Downloads from a local server that speaks the hubs' protocols, through the real clients and command line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import hub
from tiny_models import save_model, tiny_glm, tiny_tokenizer

ROOT = Path(__file__).parent.parent
REPOSITORY = "zai-org/glm-4-9b-hf"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A folder of repositories: a tiny GLM in several shards, a chat model, and one in the old format."""
    folder = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizer()
    for name in (REPOSITORY, "ZhipuAI/glm-4-9b-hf"):
        tiny_glm(tokenizer).save_pretrained(folder / name, max_shard_size="60KB")
        tokenizer.save_pretrained(folder / name)
    save_model(folder / "zai-org/glm-4-9b-chat-hf", tiny_glm(tokenizer, seed=1), tokenizer)
    (folder / REPOSITORY / "picture.png").write_bytes(b"not asked for")
    old = folder / "someone" / "renamed-chatglm"
    old.mkdir(parents=True)
    (old / "config.json").write_text(json.dumps({"model_type": "chatglm", "auto_map": {"AutoModel": "modeling.X"}}))
    (old / "model.safetensors").write_bytes(b"\0" * 100)
    return folder


@pytest.fixture
def course(tmp_path):
    (tmp_path / "home" / "weights").mkdir(parents=True)
    return tmp_path / "home"


def run(course, *arguments, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "GLM4_", "MODELSCOPE_"))}
    return subprocess.run(
        [sys.executable, "-m", "glm4_helpers", "download", "--profile", "glm-4-9b-lora", *arguments],
        cwd=ROOT,
        env={
            **kept,
            "GLM4_HOME": str(course),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(course / "hf"),
            "MODELSCOPE_CACHE": str(course / "ms"),
            **environment,
        },
        capture_output=True,
        text=True,
        timeout=240,
    )


def weights(course):
    return course / "weights" / "glm-4-9b-hf"


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["variable", "option"])
def test_a_model_comes_from_a_mirror_of_hugging_face(published, course, how):
    with hub(published) as server:
        options = ["--endpoint", server.url] if how == "option" else []
        finished = run(course, *options, **({"HF_ENDPOINT": server.url} if how == "variable" else {}))
        assert finished.returncode == 0, finished.stderr
    assert "Complete" in finished.stdout
    assert len(shards(weights(course))) > 2
    for file in shards(published / REPOSITORY):
        assert (weights(course) / file.name).read_bytes() == file.read_bytes()
    assert not (weights(course) / "picture.png").exists()


@pytest.mark.slow
def test_an_interrupted_download_goes_on_and_keeps_what_is_there(published, course):
    with hub(published) as server:
        assert run(course, HF_ENDPOINT=server.url).returncode == 0
        first = shards(weights(course))[0].name
        (weights(course) / first).unlink()
        checked = run(course, "--check")
        assert checked.returncode == 2 and first in checked.stderr and "download" in checked.stderr
        server.asked.clear()
        assert run(course, HF_ENDPOINT=server.url).returncode == 0
        fetched = {
            line.split("/")[-1].split()[0] for line in server.asked if line.startswith("GET") and "/resolve/" in line
        }
    assert {name for name in fetched if name.endswith(".safetensors")} == {first}


@pytest.mark.slow
def test_a_connection_that_breaks_off_is_an_error_with_a_way_on(published, course):
    with hub(published) as server:
        server.cut_after = 20_000
        broken = run(course, HF_ENDPOINT=server.url)
        assert broken.returncode == 2, broken.stdout
        assert "could not be downloaded" in broken.stderr and "run it again" in broken.stderr
        assert "Traceback" not in broken.stderr
        server.cut_after = 0
        assert run(course, HF_ENDPOINT=server.url).returncode == 0


@pytest.mark.slow
def test_a_model_comes_from_modelscope(published, course):
    with hub(published) as server:
        finished = run(course, "--source", "modelscope", "--endpoint", server.url)
        assert finished.returncode == 0, finished.stderr + "\n".join(server.asked)
    names = {file.name for file in shards(weights(course))}
    assert names == {file.name for file in shards(published / "ZhipuAI/glm-4-9b-hf")}


@pytest.mark.slow
def test_another_repository_goes_to_a_folder_of_its_own(published, course):
    """The chat model, to compare with, must not be written over the base model."""
    shutil.copytree(published / REPOSITORY, weights(course))
    before = {file.name: file.read_bytes() for file in shards(weights(course))}
    with hub(published) as server:
        finished = run(course, "--repository", "zai-org/glm-4-9b-chat-hf", HF_ENDPOINT=server.url)
    assert finished.returncode == 0, finished.stderr
    chat = course / "weights" / "glm-4-9b-chat-hf"
    assert f"Complete: {chat}" in finished.stdout
    assert {file.name: file.read_bytes() for file in shards(weights(course))} == before
    for file in shards(published / "zai-org/glm-4-9b-chat-hf"):
        assert (chat / file.name).read_bytes() == file.read_bytes()


def test_without_modelscopes_client_the_error_names_the_package(monkeypatch):
    from glm4_helpers.cli import download
    from glm4_helpers.support.errors import MachineError

    monkeypatch.setitem(sys.modules, "modelscope.hub.api", None)
    with pytest.raises(MachineError, match="modelscope is not installed") as error:
        download.remote_files("ZhipuAI/glm-4-9b-hf", "modelscope")
    assert '".[modelscope]"' in error.value.fix


def test_too_little_disk_is_refused_before_any_weights_are_fetched(published, course):
    with hub(published) as server:
        server.sizes["model-00001-of-00004.safetensors"] = server.sizes[shards(published / REPOSITORY)[0].name] = 10**15
        refused = run(course, HF_ENDPOINT=server.url)
        assert not [line for line in server.asked if "/resolve/" in line]
    assert refused.returncode == 2
    assert "disk space" in refused.stderr and "GiB are free" in refused.stderr
    assert not weights(course).exists()


@pytest.mark.parametrize("name", ["zai-org/glm-4-9b", "THUDM/glm-4-9b-chat"])
def test_old_repositories_are_refused_with_the_right_name(course, name):
    refused = run(course, "--repository", name)
    assert refused.returncode == 2
    assert "old format" in refused.stderr and f"Use {name}-hf" in refused.stderr


def test_the_old_format_is_known_by_its_config_too(published, course):
    with hub(published) as server:
        refused = run(course, "--repository", "someone/renamed-chatglm", HF_ENDPOINT=server.url)
        assert not [line for line in server.asked if line.startswith("GET") and "model.safetensors" in line]
    assert refused.returncode == 2 and "old format" in refused.stderr
    assert not weights(course).exists()


def test_a_repository_that_is_not_there(published, course):
    with hub(published) as server:
        refused = run(course, "--repository", "zai-org/no-such-model", HF_ENDPOINT=server.url)
    assert refused.returncode == 2 and "could not be downloaded" in refused.stderr


def test_without_network_the_error_names_a_way(course):
    refused = run(course, HF_ENDPOINT="http://127.0.0.1:9", HF_HUB_ETAG_TIMEOUT="2")
    assert refused.returncode == 2
    assert "could not be downloaded" in refused.stderr and "Fix:" in refused.stderr


def test_nano_ships_and_is_not_downloaded(course):
    refused = run(course, "--profile", "glm4-nano")
    assert refused.returncode == 2 and "ships with the repository" in refused.stderr


def test_another_model_in_the_folder_is_left_alone(published, course):
    weights(course).mkdir()
    (weights(course) / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with hub(published) as server:
        refused = run(course, HF_ENDPOINT=server.url)
    assert refused.returncode == 2 and "nothing was overwritten" in refused.stderr
    assert json.loads((weights(course) / "config.json").read_text()) == {"architectures": ["LlamaForCausalLM"]}


# Checking what is here needs no server.


@pytest.fixture
def complete(published, course, monkeypatch):
    from glm4_helpers.profiles import get_profile

    monkeypatch.setenv("GLM4_HOME", str(course))
    shutil.copytree(published / REPOSITORY, weights(course))
    return weights(course), get_profile("glm-4-9b-lora")


def test_a_complete_folder_passes(complete):
    from glm4_helpers.cli import download

    assert download.verify(*complete) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_missing_file_is_named(complete, name):
    from glm4_helpers.cli import download
    from glm4_helpers.support.errors import ModelError

    (complete[0] / name).unlink()
    with pytest.raises(ModelError, match=name) as error:
        download.verify(*complete)
    assert "download --profile glm-4-9b-lora" in error.value.fix


def test_each_missing_or_short_shard_is_named(complete):
    from glm4_helpers.cli import download
    from glm4_helpers.support.errors import ModelError

    for shard in shards(complete[0]):
        content = shard.read_bytes()
        shard.write_bytes(content[:-7])
        with pytest.raises(ModelError, match=f"{shard.name} is damaged or incomplete"):
            download.verify(*complete)
        shard.unlink()
        with pytest.raises(ModelError, match=shard.name):
            download.verify(*complete)
        shard.write_bytes(content)


def test_another_architecture_is_refused(complete):
    from glm4_helpers.cli import download
    from glm4_helpers.profiles import get_profile
    from glm4_helpers.support.errors import ModelError

    with pytest.raises(ModelError, match="needs Glm4ForCausalLM"):
        download.verify(complete[0], get_profile("glm-4-9b-0414", base_model="weights/glm-4-9b-hf"))


def test_what_is_here_already_needs_no_room(complete):
    from glm4_helpers.cli import download

    files = [download.RemoteFile(file.name, file.stat().st_size) for file in complete[0].iterdir()]
    assert download.check_disk(complete[0], files) is None
