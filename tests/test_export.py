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
from optional_packages import transformers_4
from safetensors.torch import load_file, save_file
from tiny_models import save_model, tiny_glm, tiny_tokenizer
from transformers import AutoTokenizer

from glm4_helpers import chat_format, models, training
from glm4_helpers.checks import adapters, chat_template, weights
from glm4_helpers.cli import export
from glm4_helpers.cli.main import main
from glm4_helpers.profiles import get_profile
from glm4_helpers.support.errors import MachineError, ModelError

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
    adapters.save_adapter_facts(folder, profile)
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


def saved_weights(folder):
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def test_the_exported_model_answers_as_base_and_adapter(exported):
    folder, certificate = exported
    assert (certificate.prompts, certificate.next_tokens) == (32, 32 * 9)
    assert not certificate.problems
    assert certificate.identical == certificate.tensors == len(saved_weights(folder))
    assert certificate.agreeing >= 0.9 * 288 > certificate.agreeing_without, "or the adapter would not be in it"
    assert json.loads((folder / "certificate.json").read_text())["problems"] == []
    assert "29 of 288 next tokens" in replace(certificate, agreeing=259).problems[0]
    assert len({file.stat().st_mode for file in folder.glob("*.*") if file.suffix in (".json", ".safetensors")}) == 1


def in_one_rounding(base, adapter_dir, scale):
    """weight + scale x B A in float32, rounded to bfloat16 once."""
    lora = adapters.lora_tensors(adapter_dir)
    merged = {}
    for name, weight in saved_weights(base).items():
        module = name.removesuffix(".weight")
        if f"{module}.lora_A" in lora:
            change = lora[f"{module}.lora_B"].float() @ lora[f"{module}.lora_A"].float()
            weight = (weight.float() + scale * change).to(torch.bfloat16)
        merged[name] = weight
    return merged


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", ["tiny", "nano"])
def test_the_merge_is_rounded_once_whatever_the_adapters_dtype(course, tmp_path, monkeypatch, base, dtype):
    """To the bit: PEFT adds a float32 change to bfloat16 weights in float32 and loads a bfloat16 adapter as float32."""
    if base == "nano":
        monkeypatch.setenv("GLM4_HOME", str(ROOT))
    profile = get_profile("glm4-nano")
    adapter = save_adapter(profile, tmp_path / "adapter", 0.05)
    file = adapter / "adapter_model.safetensors"
    save_file({name: weight.to(dtype) for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    export.export(profile, adapter, tmp_path / "merged")
    wanted = in_one_rounding(weights.base_folder(profile), adapter, profile.lora.alpha / profile.lora.r)
    found = saved_weights(tmp_path / "merged")
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []
    assert {weight.dtype for weight in found.values()} == {torch.bfloat16}


def test_tokenizer_template_and_stop_ids_stand_alone(exported):
    folder = exported[0]
    tokenizer = models.load_tokenizer(get_profile("glm4-nano"))
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == chat_template.stop_ids(tokenizer)
    assert str(chat_template.stop_ids(tokenizer)[1]) in (folder / "README.md").read_text(encoding="utf-8")
    alone = AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "user", "content": "你好"}]
    ids = alone.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ids == chat_format.prompt_ids(tokenizer, messages)


# Other tools


@pytest.mark.parametrize("folder", [NANO, None], ids=["the shipped model", "an export"])
def test_the_tokenizers_settings_are_those_that_transformers_4_reads(folder, request):
    folder = folder or request.getfixturevalue("exported")[0]
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"extra_special_tokens", "backend", "is_local", "local_files_only"} & set(settings)
    assert set(settings["additional_special_tokens"]) == set(chat_template.SPECIAL_TOKENS) - {"<|endoftext|>"}


@pytest.fixture
def fully_rotary(course):
    """An export of a model like GLM-Edge: rotary on the whole head instead of half of it, and another theta."""
    tokenizer = tiny_tokenizer()
    model = tiny_glm(tokenizer, partial_rotary_factor=1.0, rope_theta=50_000.0).to(torch.bfloat16)
    shutil.rmtree(course / "weights" / "glm4-nano")
    save_model(course / "weights" / "glm4-nano", model, tokenizer)
    profile = get_profile("glm4-nano")
    export.export(profile, save_adapter(profile, course / "edge", 0.05), course / "merged")
    return course / "merged"


def test_the_config_says_everything_under_the_names_of_older_tools(fully_rotary):
    config = json.loads((fully_rotary / "config.json").read_text(encoding="utf-8"))
    rope = config["rope_parameters"]
    assert (rope["partial_rotary_factor"], rope["rope_theta"]) == (1.0, 50_000.0)
    assert (config["partial_rotary_factor"], config["rope_theta"]) == (1.0, 50_000.0), "transformers 4"
    # conversion/chatglm.py of llama.cpp, as of 2026
    assert (config["layernorm_epsilon"], config["seq_length"], config["rope_ratio"]) == (1.5625e-07, 4096, 5.0)
    assert config["architectures"] == ["GlmForCausalLM"] and config["dtype"] == "bfloat16"


READ = """
import json, sys, torch, transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

def read(folder):
    config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for question in ("你好，告诉我你的名字。", "苹果的英文是什么？", "1+2等于多少？"):
        messages = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        answers.append(model.generate(**ids, max_new_tokens=24, do_sample=False)[0].tolist())
    specials = sorted(tokenizer.all_special_tokens)
    rotary = getattr(config, "partial_rotary_factor", None) or config.rope_parameters["partial_rotary_factor"]
    return {"answers": answers, "specials": specials, "rotary": rotary, "left": tokenizer.padding_side}

print(json.dumps([transformers.__version__, *map(read, sys.argv[1:])]))
"""


def test_transformers_4_gives_the_same_answers_as_5(fully_rotary, tmp_path, monkeypatch):
    path = transformers_4()
    profile = get_profile("glm4-nano")
    monkeypatch.setenv("GLM4_HOME", str(ROOT))
    export.export(profile, save_adapter(profile, tmp_path / "adapter", 0.05), tmp_path / "nano")
    line = [sys.executable, "-c", READ, str(tmp_path / "nano"), str(fully_rotary), str(NANO)]

    def read(**environment):
        done = subprocess.run(line, env={**os.environ, **environment}, capture_output=True, text=True, encoding="utf-8")
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    (five, *wanted), (four, *found) = read(), read(PYTHONPATH=path)
    assert found == wanted and [folder["rotary"] for folder in found] == [0.5, 1.0, 0.5]
    assert four.startswith("4.") and f"transformers {four} and {five}" == export.TRIED


def test_the_cards_lines_load_the_adapter_from_any_folder(exported, course, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    card = (exported[0] / "README.md").read_text(encoding="utf-8")
    lines = [
        line.strip() for line in card.partition("## The adapter itself")[2].splitlines() if line.startswith("    ")
    ]
    code = "\n".join(line for line in lines if not line.startswith("hf "))
    for given, place in (("CLONE", course), ("ADAPTER", course / "adapter"), ("merged", exported[0])):
        code = code.replace(f"PATH/TO/{given}", str(place))
    names = {}
    exec(code, names)
    assert any("lora_B" in name for name, _ in names["model"].named_parameters())
    assert names["tokenizer"].chat_template


# The device


def card(monkeypatch, free_gib, bf16=True):
    """A GPU's answers, which only the course hears: so much free memory, bfloat16 in hardware or only emulated."""

    def is_available():
        return sys._getframe(1).f_globals["__name__"].startswith("glm4_helpers")

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(free_gib * 2**30), 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a card of the test")


@pytest.mark.parametrize(
    ("free", "device"), [(10.9, "cpu"), (15.5, "cpu"), (18.4, "cpu"), (18.6, "cuda"), (79.0, "cuda")]
)
@pytest.mark.parametrize("name", ["glm-4-9b-qlora", "glm-4-9b-lora"])
def test_the_gpu_is_taken_where_the_model_in_bfloat16_fits(monkeypatch, name, free, device):
    card(monkeypatch, free)
    found, why = export.merge_device(get_profile(name))
    assert found.type == device
    assert "18.5 GiB are needed" in why and f"{free} GiB are free" in why


def test_a_gpu_without_bfloat16_leaves_the_whole_export_to_the_cpu(course, monkeypatch, capsys):
    card(monkeypatch, 14.7, bf16=False)
    certificate = export.export(get_profile("glm4-nano"), course / "adapter", course / "merged")
    assert certificate.device == "cpu" and not certificate.problems
    assert "on cpu: the GPU has no bfloat16" in capsys.readouterr().out


# Refused


def broken_scale(weights):
    return {name: weight * 1.05 if "q_proj.weight" in name else weight for name, weight in weights.items()}


def broken_layer(weights):
    return {
        name: torch.zeros_like(weight) if "layers.1.self_attn.v_proj.weight" in name else weight
        for name, weight in weights.items()
    }


def broken_a_little(weights):
    """One step of bfloat16 in every entry of one module: no rounding of another device does that."""
    return {
        name: weight * (1 + 2**-8) if "layers.0.self_attn.q_proj.weight" in name else weight
        for name, weight in weights.items()
    }


def forgotten(weights):
    return {name: weight for name, weight in weights.items() if "layers.1.mlp.down_proj" not in name}


def broken_nan(weights):
    return {
        name: weight * float("nan") if "layers.0.mlp.down_proj" in name else weight for name, weight in weights.items()
    }


@pytest.mark.parametrize("damage", [broken_scale, broken_layer, broken_a_little, forgotten, broken_nan])
def test_a_broken_merge_is_refused(exported, course, damage, capsys):
    folder = exported[0]
    for file in folder.glob("*.safetensors"):
        save_file(damage(load_file(file)), file, metadata={"format": "pt"})
    assert main(["export", "--adapter", str(course / "adapter"), "--check", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "is not what was trained" in error and "Don't use it" in error
    assert json.loads((folder / "certificate.json").read_text())["problems"]


def test_an_export_without_the_adapter_is_refused(exported, course):
    weights = saved_weights(course / "weights" / "glm4-nano")
    save_file(weights, exported[0] / "model.safetensors", metadata={"format": "pt"})
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
    assert certificate.agreeing > 0.95 * certificate.next_tokens
    assert certificate.agreeing_without < 0.9 * certificate.next_tokens, "or training would have changed nothing"
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
        f"http://127.0.0.1:{port}{path}",
        None if body is None else json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
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
        [
            sys.executable,
            "-m",
            "transformers.cli.transformers",
            "serve",
            str(tmp_path / "nano"),
            "--port",
            str(port),
            "--device",
            "cpu",
            "--dtype",
            "float32",
        ],
        stdout=(tmp_path / "log").open("w"),
        stderr=subprocess.STDOUT,
    )
    try:
        body = {
            "model": str(tmp_path / "nano"),
            "messages": messages,
            "max_tokens": 24,
            "temperature": 0,
            "stream": False,
        }
        answer = wait_for(lambda: ask(port, "/v1/chat/completions", body), server, tmp_path / "log")
    finally:
        server.terminate()
        server.wait(timeout=30)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "nano", dtype=torch.float32).eval()
    wanted = answers(model, AutoTokenizer.from_pretrained(tmp_path / "nano"), [messages], max_new_tokens=24)[0]
    text = wanted.text
    for token in chat_template.SPECIAL_TOKENS:  # the server leaves them out
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
