"""Exports of small models: what is in the folder, that it answers the same, and that a broken merge is refused."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_model, tiny_glm, tiny_tokenizer

from glm4_helpers import chat_format, export, models, training
from glm4_helpers.__main__ import main
from glm4_helpers.errors import MachineError, ModelError
from glm4_helpers.profiles import get_profile

ROOT = Path(__file__).parent.parent
NANO = ROOT / "weights" / "glm4-nano"


def save_adapter(profile, folder, size, seed=0):
    """An adapter on the profile's base model whose lora_B are random numbers of about `size`."""
    from peft import get_peft_model

    torch.manual_seed(seed)
    model = get_peft_model(models.load_base_model(profile, "float32"), training.lora_config(profile))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=size)
    model.save_pretrained(folder)
    models.save_adapter_facts(folder, profile)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A course folder with a tiny base model in several shards and an adapter for it."""
    folder = tmp_path_factory.mktemp("course")
    tokenizer = tiny_tokenizer()
    model = tiny_glm(tokenizer).to(torch.bfloat16)
    save_model(folder / "weights" / "glm4-nano", model, tokenizer)
    shutil.rmtree(folder / "weights" / "glm4-nano")
    model.save_pretrained(folder / "weights" / "glm4-nano", max_shard_size="40KB")
    tokenizer.save_pretrained(folder / "weights" / "glm4-nano")
    os.environ["GLM4_HOME"] = str(folder)
    try:
        save_adapter(get_profile("glm4-nano"), folder / "adapter", 0.05)
    finally:
        del os.environ["GLM4_HOME"]
    return folder


@pytest.fixture
def course(published, tmp_path, monkeypatch):
    shutil.copytree(published, tmp_path / "home")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def exported(course):
    folder = course / "merged"
    return folder, export.export(get_profile("glm4-nano"), course / "adapter", folder)


def test_the_exported_model_answers_as_base_and_adapter(exported):
    folder, certificate = exported
    assert certificate.prompts == 32 and certificate.positions == 32 * 9
    assert not certificate.problems
    assert certificate.agreeing == certificate.decided > 32
    assert certificate.largest_difference < certificate.largest_effect / 5, "or the adapter would not be in it"
    assert json.loads((folder / "certificate.json").read_text())["problems"] == []
    assert "enough to be compared" in replace(certificate, decided=0, agreeing=0).problems[0]
    assert len({file.stat().st_mode for file in folder.glob("*.*") if file.suffix in (".json", ".safetensors")}) == 1


def test_weights_are_those_of_pefts_own_merge_rounded_once(exported, course):
    profile = get_profile("glm4-nano")
    merged = models.load_adapter(models.load_base_model(profile, "float32"), course / "adapter", profile).merge_and_unload()
    wanted = {name: weight.to(torch.bfloat16) for name, weight in merged.state_dict().items()}
    found = {}
    for file in exported[0].glob("*.safetensors"):
        found |= load_file(file)
    assert found.keys() == {name for name in wanted if "rotary" not in name}
    for name, weight in found.items():
        assert weight.dtype == torch.bfloat16
        assert torch.allclose(weight.float(), wanted[name].float(), rtol=2**-7, atol=1e-6), name


def test_shards_tokenizer_template_and_stop_ids_stand_alone(exported, course):
    folder = exported[0]
    base = course / "weights" / "glm4-nano"
    assert {file.name for file in folder.glob("*.safetensors")} == {file.name for file in base.glob("*.safetensors")}
    tokenizer = models.load_tokenizer(get_profile("glm4-nano"))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == chat_format.stop_ids(tokenizer)
    assert str(chat_format.stop_ids(tokenizer)[1]) in (folder / "README.md").read_text()
    from transformers import AutoTokenizer

    alone = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}]
    ids = alone.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == chat_format.prompt_ids(tokenizer, messages)


def broken_scale(weights):
    return {name: weight * 1.05 if "q_proj.weight" in name else weight for name, weight in weights.items()}


def broken_layer(weights):
    return {name: torch.zeros_like(weight) if "layers.1.self_attn.v_proj.weight" in name else weight for name, weight in weights.items()}


def broken_nan(weights):
    return {name: weight * float("nan") if "layers.0.mlp.down_proj" in name else weight for name, weight in weights.items()}


@pytest.mark.parametrize("damage", [broken_scale, broken_layer, broken_nan])
def test_a_broken_merge_is_refused(exported, course, damage, capsys):
    folder = exported[0]
    for file in folder.glob("*.safetensors"):
        save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    assert main(["export", "--adapter", str(course / "adapter"), "--check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is not what was trained" in error and "Don't use it" in error
    assert json.loads((folder / "certificate.json").read_text())["problems"]


def test_an_export_without_the_adapter_is_refused(exported, course):
    base = course / "weights" / "glm4-nano"
    for file in base.glob("*.safetensors"):
        shutil.copy(file, exported[0])
    with pytest.raises(ModelError, match="not what was trained"):
        export.certify(get_profile("glm4-nano"), course / "adapter", exported[0])


def test_another_chat_template_is_refused(exported, course):
    (exported[0] / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(ModelError, match="other token ids"):
        export.certify(get_profile("glm4-nano"), course / "adapter", exported[0])


def test_an_existing_folder_is_not_overwritten(course):
    (course / "merged").mkdir()
    (course / "merged" / "mine.txt").write_text("kept")
    with pytest.raises(ModelError, match="nothing was overwritten"):
        export.export(get_profile("glm4-nano"), course / "adapter", course / "merged")
    assert (course / "merged" / "mine.txt").read_text() == "kept"


def test_an_adapter_of_the_wrong_shape_is_refused_before_anything_is_written(course):
    file = course / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "q_proj.lora_A" in name)
    weights[name] = torch.ones(weights[name].shape[0], weights[name].shape[1] + 1)
    save_file(weights, file)
    with pytest.raises(ModelError, match="does not fit this model"):
        export.export(get_profile("glm4-nano"), course / "adapter", course / "merged")
    assert not (course / "merged").exists()


def test_a_short_base_shard_is_refused(course):
    file = sorted((course / "weights" / "glm4-nano").glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ModelError, match="is damaged or incomplete"):
        export.export(get_profile("glm4-nano"), course / "adapter", course / "merged")


def test_too_little_disk_is_refused(course, monkeypatch):
    usage = shutil.disk_usage(course)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(MachineError, match="GiB are free"):
        export.export(get_profile("glm4-nano"), course / "adapter", course / "merged")
    assert not (course / "merged").exists()


# The shipped model with an adapter that was trained


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The profile glm4-nano and an adapter for it from a twentieth of an epoch of real training."""
    if not (NANO / "model.safetensors").is_file():
        pytest.fail("weights/glm4-nano is not there: git checkout -- weights")
    short = {"training.epochs": 0.05, "training.evaluations_per_run": 0, "dtype": "float32"}
    profile = get_profile("glm4-nano", **short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(ROOT))
        result = training.train(profile, tmp_path_factory.mktemp("run"), tracking_mode="disabled")
        yield profile, result.adapter_dir


@pytest.mark.slow
def test_a_trained_adapter_is_certified_on_all_32_prompts_and_a_broken_merge_refused(trained, tmp_path, capsys):
    profile, adapter = trained
    certificate = export.export(profile, adapter, tmp_path / "merged")
    with capsys.disabled():
        print(f"\n{certificate}")
    assert certificate.prompts == 32 and not certificate.problems
    assert certificate.agreeing == certificate.decided > 32
    assert certificate.largest_effect > 10 * certificate.largest_difference, "or training would have changed nothing"
    file = tmp_path / "merged" / "model.safetensors"
    base = load_file(NANO / "model.safetensors")
    weights = load_file(file)
    forgotten = next(name for name in weights if "layers.0.self_attn.v_proj.weight" in name)
    save_file({**weights, forgotten: base[forgotten].to(torch.bfloat16)}, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="not what was trained") as refused:
        export.certify(profile, adapter, tmp_path / "merged")
    with capsys.disabled():
        print(f"One layer's merge left out: {refused.value.problem}")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def ask(port, path, body=None):
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}{path}", None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )  # fmt: skip
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.slow
def test_transformers_serve_answers_in_the_trained_format(trained, tmp_path):
    """The exported nano behind an OpenAI-style server answers as the helpers do."""
    from glm4_helpers.generation import answers

    export.export(*trained, tmp_path / "nano")
    messages = [{"role": "user", "content": "苹果的英文是什么？"}]
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "transformers.cli.transformers", "serve", str(tmp_path / "nano"), "--port", str(port), "--device", "cpu", "--dtype", "float32"],
        stdout=(tmp_path / "log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        body = {"model": str(tmp_path / "nano"), "messages": messages, "max_tokens": 24, "temperature": 0, "stream": False}
        answer = wait_for(lambda: ask(port, "/v1/chat/completions", body), server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(timeout=30)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nano", dtype=torch.float32).eval()
    wanted = answers(model, AutoTokenizer.from_pretrained(tmp_path / "nano"), [messages], max_new_tokens=24)[0]
    text = wanted.text
    for token in chat_format.SPECIAL_TOKENS:  # the server leaves them out
        text = text.replace(token, "")
    assert answer["choices"][0]["message"]["content"].strip() == text.strip()


def wait_for(act, server, log, seconds=120):
    end = time.monotonic() + seconds
    while True:
        try:
            return act()
        except OSError as error:
            if server.poll() is not None or time.monotonic() > end:
                raise AssertionError(f"{error}\n{log.read_text()[-3000:]}") from error
            time.sleep(1)
