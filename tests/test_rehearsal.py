"""Rehearsals of two layers at true widths and vocabulary, and what a rehearsal refuses before it starts."""

import contextlib
import hashlib
import json
import types

import pytest
import torch
from optional_packages import python_path

from benchmarks import rehearse as rehearsal
from glm4_helpers import chat_format, models
from glm4_helpers.checks import chat_template, weights
from glm4_helpers.machine import memory
from glm4_helpers.profiles import get_profile
from glm4_helpers.support.errors import MachineError, SettingError


@pytest.fixture(autouse=True)
def _course(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))


def rehearse(capsys, folder, profile, layers, *options):
    status = rehearsal.main(
        ["--profile", profile, "--layers", str(layers), "--folder", str(folder), "--json", *options]
    )
    printed = capsys.readouterr()
    assert status == 0, printed.err
    return {stage["name"]: stage for stage in json.loads(printed.out)["stages"]}


SLICES = {"glm-edge-1.5b": 3, "glm-4-9b-lora": 6, "glm-4-9b-qlora": 6, "glm-4-9b-0414": 6, "glm-4-9b-full": 19}
"""Profiles with the memory in GiB that has to be free for their first two layers and their vocabulary."""


@pytest.mark.slow
@pytest.mark.parametrize("name", SLICES)
def test_the_whole_path_is_walked(tmp_path, capsys, monkeypatch, report, name):
    profile = get_profile(name)
    if rehearsal._available_gib() < SLICES[name]:
        pytest.skip(f"less than {SLICES[name]} GiB of memory are free")
    if profile.quantization:
        monkeypatch.setenv("PYTHONPATH", python_path("bitsandbytes"))
    stages = rehearse(capsys, tmp_path / "rehearsal", name, 2, "--tokens", "64")
    assert list(stages) == ["build", *rehearsal.STAGES]
    shape = memory.shape_of(rehearsal.model_config(profile, 2))
    assert stages["load"]["found"]["parameters"] == shape.parameters
    assert stages["train"]["found"]["killed_in_step"] == 3
    assert stages["train"]["found"]["tokens_a_second"] == pytest.approx(
        64 / stages["train"]["found"]["s_a_step"], rel=0.1
    )
    assert stages["resume"]["found"]["resumed_from"] == 2 and stages["resume"]["found"]["steps"] == 3
    if profile.lora:
        assert stages["reload"]["found"]["adapter_modules"] == 2 * 3
        assert stages["reload"]["found"]["adapter_effect"] > 0
    assert stages["reload"]["found"]["streamed"]
    shown = [f"{stage['name']} {stage['seconds']:.0f} s {stage['peak_gib']:.2f} GiB" for stage in stages.values()]
    guess = stages["train"]["estimate_gib"]
    report("Rehearsals of two layers (training estimated)", f"{name} ({guess:.2f} GiB): {', '.join(shown)}")
    assert not (tmp_path / "rehearsal").exists()


def small(profile, **changes):
    """The profile's config with narrow layers; ids and vocabulary stay true."""
    config = rehearsal.model_config(profile, 2)
    narrow = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    for name, value in {**narrow, **changes}.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("name", ["glm-4-9b-lora", "glm-edge-1.5b"])
def test_the_stand_in_tokenizer_has_the_true_ids(name):
    config = rehearsal.model_config(get_profile(name), 1)
    tokenizer = rehearsal.stand_in_tokenizer(config)
    assert chat_template.stop_ids(tokenizer) == config.eos_token_id
    assert len(tokenizer) <= config.vocab_size
    encoded = chat_format.encode(tokenizer, [{"role": "user", "content": "你"}, {"role": "assistant", "content": "b"}])
    assert max(encoded["input_ids"]) < config.vocab_size
    if name == "glm-4-9b-lora":
        assert len(tokenizer) == 151_343
        assert tokenizer.convert_tokens_to_ids(["[gMASK]", "<sop>", "<|assistant|>"]) == [151_331, 151_333, 151_337]


def test_the_same_model_is_built_each_time_in_shards_with_an_index(tmp_path, monkeypatch):
    profile = get_profile("glm-4-9b-lora")
    monkeypatch.setattr(rehearsal, "SHARD_BYTES", 3 * 2**20)
    digests = []
    for name in ("one", "two"):
        rehearsal.build(profile, tmp_path / name, small(profile), 64)
        monkeypatch.setenv("GLM4_HOME", str(tmp_path / name))
        weights.check_weights(weights.base_folder(profile), profile)
        files = weights.weight_files(weights.base_folder(profile), profile)
        assert len(files) > 1
        digests.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert digests[0] == digests[1]


def test_rows_have_exactly_the_asked_tokens(tmp_path):
    from glm4_helpers.data import to_messages

    tokenizer = rehearsal.stand_in_tokenizer(small(get_profile("glm-4-9b-lora")))
    assert len(chat_format.encode(tokenizer, to_messages(rehearsal._row(3, 256)))["input_ids"]) == 256


@pytest.mark.parametrize("layers", [0, 41])
def test_layers_that_are_not_there_are_refused(layers):
    with pytest.raises(SettingError, match="no .* layers"):
        rehearsal.model_config(get_profile("glm-4-9b-lora"), layers)


def test_a_folder_with_something_in_it_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("kept")
    assert rehearsal.main(["--profile", "glm-edge-1.5b", "--layers", "1", "--folder", str(tmp_path / "mine")]) == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "kept"


def test_an_empty_folder_is_emptied_again(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()

    def build_only(profile, folder, *rest):
        (folder / "large").write_text("weights")
        return []

    monkeypatch.setattr(rehearsal, "rehearse", build_only)
    assert rehearsal.main(["--profile", "glm-edge-1.5b", "--folder", str(tmp_path / "mine"), "--json"]) == 0
    assert not (tmp_path / "mine" / "large").exists()


def test_too_little_memory_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(MachineError, match=r"needs about \d+\.\d GiB; \d+\.\d GiB are there"):
        rehearsal.rehearse(get_profile("glm-4-9b-full"), tmp_path / "new", tokens=100_000)
    assert not (tmp_path / "new").exists()


def test_rows_too_short_for_an_answer_are_refused(tmp_path, capsys):
    assert rehearsal.main(["--layers", "1", "--tokens", "11", "--folder", str(tmp_path / "new")]) == 2
    assert "no room for an answer" in (said := capsys.readouterr().err) and "--tokens 12" in said
    assert not (tmp_path / "new").exists()


def test_the_adapter_is_tried_on_the_device_of_its_model(monkeypatch):
    class Elsewhere:
        device = torch.device("meta")

        def __call__(self, ids):
            assert ids.device == self.device, "a model on a GPU can't take ids on a CPU"
            return types.SimpleNamespace(logits=torch.zeros(1, 1, 8))

    monkeypatch.setattr(models, "adapter_off", contextlib.nullcontext)
    assert rehearsal.adapter_effect(Elsewhere(), lambda text: {"input_ids": [1, 2]}) == 0


def test_on_a_gpu_its_free_memory_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "on_gpu", lambda: True)
    monkeypatch.setattr(rehearsal.subprocess, "check_output", lambda *command, **options: f"{12 * 2**30}\n")
    with pytest.raises(MachineError, match=r"needs about 1\d\.\d GiB; 12\.0 GiB are there"):
        rehearsal.rehearse(get_profile("glm-4-9b-lora"), tmp_path / "new")
