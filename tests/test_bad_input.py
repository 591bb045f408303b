"""Bad input as a user gives it, and the message that they see: it names what is wrong and how to mend it.

Each case prepares a course folder and returns what a user would do: a command line, or a call. The message must be one
problem and one fix without a traceback, and every file that was there must still be there, byte for byte. The table of
all cases is printed when the tests are done.
"""

import io
import json
import random
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_model, tiny_glm, tiny_tokenizer
from transformers import TrainerCallback

from glm4_helpers import generation, models, training
from glm4_helpers.checks import adapters
from glm4_helpers.cli import export
from glm4_helpers.cli.main import main
from glm4_helpers.machine import hardware
from glm4_helpers.profiles import get_profile
from glm4_helpers.support.errors import CourseError

TITLE = "bad input: what a user sees"
WIDTHS = (42, 96)
WRITTEN_BY_A_REFUSAL = {".lock", "certificate.json"}
"""Files that a refused command may write: the lock of an output folder, and the certificate that says what is wrong."""


@dataclass(frozen=True)
class Command:
    """A line of the command line, with what is typed into it."""

    arguments: tuple[str, ...]
    typed: str = ""


@dataclass(frozen=True)
class Case:
    given: str
    names: tuple[str, ...]
    prepare: object


CASES: list[Case] = []


def case(given, *names):
    """Add a case: what is given, and what the message must name."""

    def add(prepare):
        CASES.append(Case(given, names, prepare))
        return prepare

    return add


# What a user does


def command(*arguments, typed=""):
    return Command(tuple(map(str, arguments)), typed)


def train(*options):
    return command("train", "--tracking", "disabled", "--set", "dtype=float32", *options)


def chat(*options, typed="你好\n"):
    return command("chat", "--base", "--max-new-tokens", "4", *options, typed=typed)


def chat_with_adapter(folder):
    return command("chat", "--adapter", folder / "adapter", typed="你好\n")


def save(file, content):
    file.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


def train_on(folder, content, name="mine.json"):
    save(folder / name, content)
    return train("--set", f"train_data={name}")


def change_json(file, **changes):
    save(file, {**json.loads(file.read_text(encoding="utf-8")), **changes})


def change_weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut_short(file, missing=100):
    file.write_bytes(file.read_bytes()[:-missing])


# Data files

ALPACA = {"instruction": "翻译成英文。", "input": "苹果", "output": "apple"}
TURNS = [{"role": "user", "content": "苹果的英文？"}, {"role": "assistant", "content": "apple"}]
SHAREGPT = {"conversations": [{"from": "human", "value": "苹果的英文？"}, {"from": "gpt", "value": "apple"}]}

BAD_ROWS = (
    ("an empty file", "", ("mine.json", "is empty")),
    ("a list without rows", [], ("mine.json", "holds no rows")),
    ("a JSON file with a comma too many", '[{"instruction": "a",]', ("mine.json", "line 1, column 22")),
    ("rows below a key of an object", {"data": [ALPACA]}, ("mine.json", "a list in 'data' instead of a list of rows")),
    ("a web page called .json", "<!DOCTYPE html>\n<html></html>", ("mine.json", "a web page", "/resolve/")),
    (
        "a Git LFS pointer called .json",
        "version https://git-lfs.github.com/spec/v1\n",
        ("mine.json", "LFS", "git lfs pull"),
    ),
    ("a row that is text", [ALPACA, "apple"], ("mine.json, row 2", "text instead of an object")),
    (
        "a row with unknown columns",
        [{"问题": "a", "答案": "b"}],
        ("mine.json, row 1", "columns={问题: instruction, 答案: output}"),
    ),
    (
        "several rows that can't be used",
        [ALPACA, "x", {"output": "a"}],
        ("2 of 3 rows", "row 2", "row 3", "skip_bad_rows"),
    ),
    ("a row without output", [ALPACA, {"instruction": "a"}], ("mine.json, row 2", "'output' is missing")),
    ("an output that is a number", [{**ALPACA, "output": 3}], ("mine.json, row 1", "'output' is a number")),
    ("an input that is a list", [{**ALPACA, "input": ["a"]}], ("mine.json, row 1", "'input' is a list")),
    ("a history turn of three texts", [{**ALPACA, "history": [["a", "b", "c"]]}], ("row 1", "turn 1 of history")),
    ("a history that is text", [{**ALPACA, "history": "a"}], ("row 1", "'history' is text, not a list")),
    (
        "ShareGPT from an unknown sender",
        [{"conversations": [{"from": "me", "value": "a"}]}],
        ("row 1", "turn 1", "'me'"),
    ),
    (
        "ShareGPT with an empty value",
        [{"conversations": [{"from": "human", "value": None}]}],
        ("row 1", "turn 1", "missing"),
    ),
    (
        "messages with an unknown role",
        [{"messages": [{"role": "bot", "content": "a"}]}],
        ("row 1", "message 1", "'bot'"),
    ),
    ("messages that begin with the assistant", [{"messages": TURNS[1:]}], ("row 1", "the assistant's turn")),
    (
        "pairs of a good and a bad answer",
        [{"instruction": "a", "chosen": "b", "rejected": "c"}],
        ("row 1", "'chosen'", "DPO"),
    ),
    (
        "an answer that is marked as bad",
        [ALPACA, {**ALPACA, "kto_tag": False}],
        ("row 2", "kto_tag", "KTO", "skip_bad_rows"),
    ),
    ("rows with images", [{**ALPACA, "images": ["cat.jpg"]}], ("row 1", "'images'", "text only")),
    ("half a weight", [{"messages": [TURNS[0], {**TURNS[1], "weight": 0.5}]}], ("row 1", "message 2", "0.5")),
    ("two formats in one row", [{**ALPACA, **SHAREGPT}], ("row 1", "mixes the formats Alpaca and ShareGPT")),
    ("rows that all end with the user's turn", [{"messages": TURNS[:1]}] * 3, ("3 of 3 rows", "3 without an answer")),
)
for given, content, names in BAD_ROWS:
    case(given, *names)(lambda folder, content=content: train_on(folder, content))


@case("a data file that is not there", "mine.json was not found")
def _(folder):
    return train("--set", "train_data=mine.json")


@case("a data folder without data files", "empty holds no rows")
def _(folder):
    (folder / "empty").mkdir()
    return train("--set", "train_data=empty")


@case("a data file in the encoding GBK", "mine.json is not UTF-8")
def _(folder):
    (folder / "mine.json").write_bytes(json.dumps([ALPACA], ensure_ascii=False).encode("gbk"))
    return train("--set", "train_data=mine.json")


@case("a broken line in a JSON Lines file", "mine.jsonl, row 2 (line 3)", "column 2")
def _(folder):
    return train_on(folder, json.dumps(ALPACA) + "\n\n{oops}\n", "mine.jsonl")


@case("a data set on a hub, without network", "llamafactory/alpaca_gpt4_zh", "Hugging Face", "GLM4_HUB")
def _(folder):
    return train("--set", "train_data=llamafactory/alpaca_gpt4_zh")


@case("a held-out set that is not there", "data/test/unseen_rows.json")
def _(folder):
    return command("evaluate", "--adapter", folder / "adapter")


# Profiles and settings


@case("a misspelt profile", "'glm4-nan'", "Did you mean glm4-nano?")
def _(folder):
    return command("train", "--profile", "glm4-nan")


@case("a misspelt profile in GLM4_PROFILE", "'glm-4-9b-lra'", "Did you mean glm-4-9b-lora?")
def _(folder, monkeypatch):
    monkeypatch.setenv("GLM4_PROFILE", "glm-4-9b-lra")
    return command("doctor")


@case("a misspelt key in --set", "'training.epoch'", "Did you mean training.epochs?")
def _(folder):
    return train("--set", "training.epoch=1")


@case("--set without a value", "'training.epochs'", "KEY=VALUE")
def _(folder):
    return train("--set", "training.epochs")


@case("a setting of the wrong type", "training.epochs", "'many'", "a number")
def _(folder):
    return train("--set", "training.epochs=many")


@case("a learning rate below zero", "training.learning_rate", "-0.001", "above 0")
def _(folder):
    return train("--set", "training.learning_rate=-1e-3")


@case("an unknown schedule of the learning rate", "training.lr_scheduler", "'liner'", "linear")
def _(folder):
    return train("--set", "training.lr_scheduler=liner")


@case("float16 for GLM-4", "dtype", "float16", "NaN")
def _(folder):
    return train("--set", "dtype=float16")


@case("a max_length that no row fits", "longer than 5 tokens", "training.max_length")
def _(folder):
    return train("--set", "training.max_length=5")


@case("a dev_fraction that holds nothing out", "0.1%", "dev_fraction")
def _(folder):
    return train("--set", "dev_data=null", "--set", "dev_fraction=0.001")


@case("LoRA targets that GLM-4 does not have", "gate_proj", "gate_up_proj")
def _(folder):
    return train("--set", "lora.target_modules=[q_proj, gate_proj]")


@case("LoRA settings for full fine-tuning", "lora.r", "glm-4-9b-full")
def _(folder):
    return train("--profile", "glm-4-9b-full", "--set", "lora.r=4")


@case("a misspelt key in a YAML file", "mine.yaml", "'training.learning_rte'", "training.learning_rate")
def _(folder):
    return train("--config", save(folder / "mine.yaml", "training:\n  learning_rte: 1e-3\n"))


@case("a wrong type in a YAML file", "mine.yaml", "training.epochs", "'three'")
def _(folder):
    return train("--config", save(folder / "mine.yaml", "training:\n  epochs: three\n"))


@case("a YAML file that is not YAML", "mine.yaml is not YAML")
def _(folder):
    return train("--config", save(folder / "mine.yaml", "training: [1\n"))


@case("a YAML file that is not there", "mine.yaml", "No such file")
def _(folder):
    return train("--config", folder / "mine.yaml")


# Base models

WEIGHTS = "weights/glm4-nano"


@case("a base model that is not there", WEIGHTS, "git checkout")
def _(folder):
    shutil.rmtree(folder / WEIGHTS)
    return train()


@case("a 9B model that was not downloaded", "weights/glm-4-9b-hf", "download --profile glm-4-9b-lora")
def _(folder):
    return chat("--profile", "glm-4-9b-lora")


@case("a download that stopped before the last shard", "model-00002-of-", "incomplete")
def _(folder):
    sorted((folder / WEIGHTS).glob("*.safetensors"))[1].unlink()
    return train()


@case("a shard that was cut short", "model-00001-of-", "is damaged or incomplete")
def _(folder):
    cut_short(sorted((folder / WEIGHTS).glob("*.safetensors"))[0])
    return train()


@case("a Git LFS pointer instead of weights", "model-00001-of-", "Git LFS pointer")
def _(folder):
    save(sorted((folder / WEIGHTS).glob("*.safetensors"))[0], "version https://git-lfs.github.com/spec/v1\nsize 1\n")
    return chat()


@case("an index of shards that is not JSON", "model.safetensors.index.json is not JSON")
def _(folder):
    save(folder / WEIGHTS / "model.safetensors.index.json", '{"weight_map": ')
    return chat()


@case("a config.json with more layers than the weights", WEIGHTS, "lack model.layers.2.", "0 of another shape")
def _(folder):
    change_json(folder / WEIGHTS / "config.json", num_hidden_layers=3)
    return chat()


@case("a config.json of another size", WEIGHTS, "another shape", "config.json")
def _(folder):
    change_json(folder / WEIGHTS / "config.json", intermediate_size=96)
    return chat()


@case("another architecture than the profile's", WEIGHTS, "LlamaForCausalLM", "needs GlmForCausalLM")
def _(folder):
    change_json(folder / WEIGHTS / "config.json", architectures=["LlamaForCausalLM"], model_type="llama")
    return train()


@case("weights in the old format of GLM-4-9B", WEIGHTS, "ChatGLMModel", "old format")
def _(folder):
    code = {"AutoConfig": "configuration_chatglm.ChatGLMConfig"}
    change_json(folder / WEIGHTS / "config.json", architectures=["ChatGLMModel"], model_type="chatglm", auto_map=code)
    return chat()


@case("a download of the old format", "zai-org/glm-4-9b ", "old format", "Use zai-org/glm-4-9b-hf")
def _(folder):
    return command("download", "--profile", "glm-4-9b-lora", "--repository", "zai-org/glm-4-9b")


@case("a download without network", "zai-org/glm-4-9b-hf", "Hugging Face", "network")
def _(folder):
    return command("download", "--profile", "glm-4-9b-lora")


@case("a tokenizer.json that is not there", "tokenizer.json", "git checkout")
def _(folder):
    (folder / WEIGHTS / "tokenizer.json").unlink()
    return chat()


@case("a tokenizer.json without content", "tokenizer", WEIGHTS)
def _(folder):
    save(folder / WEIGHTS / "tokenizer.json", {})
    return chat()


@case("a tokenizer without GLM-4's special tokens", "special tokens", "<|assistant|>")
def _(folder):
    file = folder / WEIGHTS / "tokenizer.json"
    change_json(file, added_tokens=[])
    change_json(folder / WEIGHTS / "tokenizer_config.json", extra_special_tokens=[], added_tokens_decoder={})
    return chat()


# Adapters


@case("an adapter that is not there", "nowhere", "adapter_config.json is absent", "glm4_helpers train")
def _(folder):
    return command("chat", "--adapter", folder / "nowhere")


@case("an adapter that was cut short", "adapter_model.safetensors", "is damaged or incomplete")
def _(folder):
    cut_short(folder / "adapter" / "adapter_model.safetensors")
    return chat_with_adapter(folder)


@case("an adapter of another base model", "adapter", "other base weights", "fingerprint")
def _(folder):
    tokenizer = tiny_tokenizer()
    shutil.rmtree(folder / WEIGHTS)
    save_model(folder / WEIGHTS, tiny_glm(tokenizer, seed=7), tokenizer)
    return chat_with_adapter(folder)


@case("an adapter of the wrong shape", "q_proj.lora_A", "does not fit")
def _(folder):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change_weights(folder / "adapter" / "adapter_model.safetensors", lambda all: all.update({name: torch.ones(4, 33)}))
    return chat_with_adapter(folder)


@case("an adapter that was never trained", "lora_B is all zeros", "not live")
def _(folder):
    def forget(tensors):
        tensors.update({name: torch.zeros_like(tensor) for name, tensor in tensors.items() if "lora_B" in name})

    change_weights(folder / "adapter" / "adapter_model.safetensors", forget)
    return chat_with_adapter(folder)


@case("an adapter with NaN in it", "v_proj.lora_A", "NaN")
def _(folder):
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    change_weights(folder / "adapter" / "adapter_model.safetensors", lambda all: all[name].fill_(float("nan")))
    return chat_with_adapter(folder)


@case("an adapter on fewer modules than the profile", "2 modules", "expects 6", "q_proj, k_proj, v_proj")
def _(folder):
    shutil.rmtree(folder / "adapter")
    save_adapter(folder / "adapter", **{"lora.target_modules": ["q_proj"]})
    return chat_with_adapter(folder)


@case("an adapter that names modules GLM-4 lacks", "up_proj", "gate_up_proj")
def _(folder):
    change_json(folder / "adapter" / "adapter_config.json", target_modules=["q_proj", "up_proj"])
    return chat_with_adapter(folder)


@case("an adapter that is no LoRA", "adapter", "not a LoRA adapter")
def _(folder):
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    shutil.rmtree(folder / "adapter")
    get_peft_model(models.load_base_model(get_profile(), "float32"), settings).save_pretrained(folder / "adapter")
    return chat_with_adapter(folder)


# Training


@case("two processes with one output folder", "Another process", "outputs/glm4-nano", "--output")
def _(folder, request):
    (folder / "outputs" / "glm4-nano").mkdir(parents=True)
    lock = folder / "outputs" / "glm4-nano" / ".lock"
    hold = "import sys, filelock\nwith filelock.FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    request.addfinalizer(lambda: other.communicate(timeout=60))
    assert other.stdout.readline() == "held\n"
    return train()


@case("an unfinished run of other settings", "checkpoints", "training.seed was 1 and is 2", "--no-resume")
def _(folder, interrupted):
    shutil.copytree(interrupted, folder / "outputs" / "glm4-nano", dirs_exist_ok=True)
    run = folder / "outputs" / "glm4-nano" / "checkpoints" / "run.json"
    run.write_text(run.read_text().replace(str(interrupted), str(run.parent.parent)))
    return train("--set", "training.seed=2")


@case("an unfinished run on other rows", "checkpoints", "data.train was", "--output")
def _(folder, interrupted):
    prepared = CASES_BY_GIVEN["an unfinished run of other settings"].prepare(folder, interrupted)
    save(folder / "data" / "train.json", rows(12, seed=9))
    return Command(tuple(prepared.arguments[:-2]) + ("--set", "training.seed=1"))


@case("an output folder that is a file", "results", "File exists", "--output")
def _(folder):
    return train("--output", save(folder / "results", "mine"))


@case("too little disk space", "disk space", "GiB are free", "--output")
def _(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return command("export", "--adapter", folder / "adapter", "--output", folder / "exported")


@case("training with too little memory", "glm4-nano with batch 8", "0.0 GiB are there", "smaller profile")
def _(folder, monkeypatch):
    found = hardware.this_machine()
    monkeypatch.setattr(hardware, "this_machine", lambda folder=None: replace(found, memory_available_gib=0.0))
    return train("--output", folder / "results")


@case("training with too little disk space", "checkpoints of glm4-nano", "GiB are free", "--output")
def _(folder, monkeypatch):
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    return train("--output", folder / "results")


@case("SwanLab's cloud without a key", "API key", "swanlab login", "offline")
def _(folder, monkeypatch):
    monkeypatch.delenv("SWANLAB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(folder))
    return command("train", "--tracking", "cloud")


# Generation


@case("a temperature below zero", "temperature", "-1", "0 (greedy)")
def _(folder):
    return chat("--temperature", "-1")


@case("a top_p above one", "top_p", "1.5")
def _(folder):
    return chat("--top-p", "1.5")


@case("an answer longer than the model", "max_new_tokens", "9,999", "4,096 positions")
def _(folder):
    return chat("--max-new-tokens", "9999")


@case("a system prompt that alone is too long", "system prompt", "4,092 fit")
def _(folder):
    return chat("--system", "好" * 5000)


def ask(*messages):
    def act():
        model, tokenizer = models.load_base_model(get_profile(), "float32"), models.load_tokenizer(get_profile())
        generation.answers(model, tokenizer, [list(messages)], max_new_tokens=4)

    return act


@case("an empty question", "no message with content", '"role": "user"')
def _(folder):
    return ask({"role": "user", "content": ""})


@case("a conversation with nothing to answer", "nothing to answer", "role user")
def _(folder):
    return ask(*TURNS)


@case("a message without content", "The content of message 1 (user) is missing")
def _(folder):
    return ask({"role": "user"})


# Chat


@case("/adapter without an adapter", "no adapter to switch", "/checkpoint")
def _(folder):
    return chat(typed="/adapter on\n")


@case("a checkpoint that is not there", "checkpoint nowhere")
def _(folder):
    return chat(typed="/checkpoint nowhere\n")


@case("an unknown command in the chat", "/rset", "/reset")
def _(folder):
    return chat(typed="/rset\n")


@case("/save into a file that exists", "mine.json", "File exists")
def _(folder):
    return chat(typed=f"你好\n/save {save(folder / 'mine.json', 'mine')}\n")


# Export


@case("an export into an existing folder", "merged", "exists already; nothing was overwritten")
def _(folder):
    return command("export", "--adapter", folder / "adapter", "--output", folder / "merged")


@case("an export that was broken afterwards", "merged", "not what was trained", "Don't use it")
def _(folder):
    for file in (folder / "merged").glob("*.safetensors"):
        change_weights(file, lambda all: all.update({name: all[name] * 1.1 for name in all if "q_proj.weight" in name}))
    return command("export", "--adapter", folder / "adapter", "--check", folder / "merged")


@case("a certificate for a folder without a model", "nowhere", "no exported model")
def _(folder):
    return command("export", "--adapter", folder / "adapter", "--check", folder / "nowhere")


# The command line


@case("an unknown command", "'trian'", "Did you mean train?")
def _(folder):
    return command("trian")


@case("no command at all", "COMMAND", "--help")
def _(folder):
    return command()


@case("an unknown value of an option", "--tracking", "'onlin'", "Did you mean offline?")
def _(folder):
    return command("train", "--tracking", "onlin")


@case("a seed that is no number", "--seed", "'one'")
def _(folder):
    return command("train", "--seed", "one")


@case("an answer of no tokens", "--max-new-tokens", "'0'", "from 1")
def _(folder):
    return chat("--max-new-tokens", "0")


@case("options that exclude each other", "--seeds", "not allowed with", "--adapter")
def _(folder):
    return command("evaluate", "--adapter", "a", "--seeds", "1")


@case("options of evaluate that --seeds has no use for", "--rows and --baseline", "--seeds")
def _(folder):
    return command("evaluate", "--seeds", "1", "--rows", "5", "--baseline", "none")


@case("a number of rows for scores that take all rows", "--rows can't be used with glm4-nano")
def _(folder):
    return command("evaluate", "--rows", "5")


@case("a half of data that has none", "--half can't be used with glm-4-9b-lora")
def _(folder):
    return command("evaluate", "--profile", "glm-4-9b-lora", "--half", "dev")


@case("a check of a model that is not the profile's", "--check", "not allowed with", "--repository")
def _(folder):
    return command("download", "--repository", "zai-org/glm-4-9b-chat-hf", "--check")


@case("a ZeRO stage that 4-bit weights can't have", "ZeRO stage 3", "4-bit")
def _(folder):
    return command("memory", "--profile", "glm-4-9b-qlora", "--zero", "3")


@case("a seed that is too large", "training.seed", "from 0 to 4294967295")
def _(folder):
    return command("train", "--seed", "99999999999999")


@case("4-bit weights for full fine-tuning", "glm-4-9b-full trains all weights", "glm-4-9b-qlora")
def _(folder):
    return command("memory", "--profile", "glm-4-9b-full", "--quantization", "nf4")


@case("a chat with a fully fine-tuned model before there is one", "no trained model in", "Train it")
def _(folder):
    return command("chat", "--set", "lora=null", typed="你好\n")


# The environment


@case("GLM4_HOME that names no folder", "GLM4_HOME", "nowhere")
def _(folder, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(folder / "nowhere"))
    return command("train")


@case("a command outside of the course folder", "course folder", "GLM4_HOME")
def _(folder, monkeypatch):
    monkeypatch.delenv("GLM4_HOME")
    return command("train")


@case("GLM4_HUB that names no hub", "GLM4_HUB", "'github'", "modelscope")
def _(folder, monkeypatch):
    monkeypatch.setenv("GLM4_HUB", "github")
    return train("--set", "train_data=owner/name")


@case("a variable that SwanLab can't read", "SWANLAB_PROJECT", "SWANLAB_PROJ_NAME")
def _(folder, monkeypatch):
    monkeypatch.setenv("SWANLAB_PROJECT", "mine")
    return command("train")


@case("a package that is not installed", "psutil", "pip install")
def _(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    return command("doctor")


CASES_BY_GIVEN = {given.given: given for given in CASES}


# The course folder that each case has for itself


def rows(count, seed=1):
    numbers = random.Random(seed)
    sums = [(numbers.randint(0, 99), numbers.randint(0, 9)) for _ in range(count)]
    return [
        {
            "id": f"{seed}-{index}",
            "kind": "sum",
            "instruction": f"{a}+{b}等于多少？",
            "input": "",
            "output": f"{a + b}。",
        }
        for index, (a, b) in enumerate(sums)
    ]


def save_adapter(folder, **overrides):
    """A live adapter of the course folder in GLM4_HOME."""
    profile = get_profile(**overrides)
    torch.manual_seed(1)
    model = get_peft_model(models.load_base_model(profile, "float32"), training.lora_config(profile))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    model.save_pretrained(folder)
    adapters.save_adapter_facts(folder, profile)


@pytest.fixture(scope="module")
def whole_course(tmp_path_factory):
    """A course folder with nothing wrong in it: base model in shards, rows, adapter and export."""
    folder = tmp_path_factory.mktemp("course")
    for name in ("data/dev", "data/test", WEIGHTS):
        (folder / name).mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(folder / WEIGHTS)
    tiny_glm(tokenizer).to(torch.bfloat16).save_pretrained(folder / WEIGHTS, max_shard_size="40KB")
    save(folder / "data" / "train.json", rows(12))
    save(folder / "data" / "dev" / "unseen_rows.json", rows(4, seed=2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(folder))
        save_adapter(folder / "adapter")
        export.export(get_profile(), folder / "adapter", folder / "merged")
    return folder


@pytest.fixture
def folder(whole_course, tmp_path, monkeypatch):
    shutil.copytree(whole_course, tmp_path / "course")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "course"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "course"


class Interrupt(TrainerCallback):
    """Ctrl-C after the first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


@pytest.fixture(scope="module")
def interrupted(whole_course, tmp_path_factory):
    """The output folder of a run, with seed 1, that was interrupted after its first checkpoint."""
    output = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(whole_course))
        profile = get_profile(**{"dtype": "float32", "max_new_tokens": 2, "training.seed": 1})
        with pytest.raises(KeyboardInterrupt):
            training.train(profile, output, tracking_mode="disabled", callbacks=[Interrupt()])
    assert list(output.glob("checkpoints/checkpoint-*"))
    return output


# The test


def refusal(act, capsys, monkeypatch):
    """Problem and fix that a user reads."""
    if isinstance(act, Command):
        return printed_refusal(act, capsys, monkeypatch)
    with pytest.raises(CourseError) as raised:
        act()
    return raised.value.problem, raised.value.fix


def printed_refusal(line, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(line.typed))
    try:
        status = main(line.arguments)
    except SystemExit as stopped:
        status = stopped.code
    printed = capsys.readouterr()
    goes_on = "/help lists the commands" in printed.err  # the chat shows errors and goes on
    assert status == (0 if goes_on else 2), printed.err
    assert "Traceback" not in printed.err + printed.out
    said = re.findall(r"^error: (.*)\nFix: (.*)$", printed.err, re.MULTILINE)
    assert len(said) == printed.err.count("error: ") == 1, printed.err
    return said[0]


def contents(folder):
    return {
        path: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in WRITTEN_BY_A_REFUSAL
    }


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: CASES[number].given)
def test_the_message_names_what_is_wrong_and_nothing_is_lost(number, folder, request, capsys, monkeypatch, report):
    bad = CASES[number]
    wanted = bad.prepare.__code__.co_varnames[1 : bad.prepare.__code__.co_argcount]
    act = bad.prepare(folder, **{name: request.getfixturevalue(name) for name in wanted if name != "content"})
    before = contents(folder)
    problem, fix = refusal(act, capsys, monkeypatch)
    assert contents(folder) == before
    assert fix and "\n" not in problem + fix
    for name in bad.names:
        assert name in f"{problem}\n{fix}", (problem, fix)
    report(TITLE, row(number + 1, bad.given, problem, fix, folder), number)


def row(number, given, problem, fix, folder):
    """Two columns, wrapped."""
    shown = [text.replace(f"{folder}/", "").replace(str(folder.parent), "…") for text in (problem, f"Fix: {fix}")]
    left = textwrap.wrap(f"{number:3} {given}", WIDTHS[0], subsequent_indent="    ")
    right = [line for text in shown for line in textwrap.wrap(text, WIDTHS[1], subsequent_indent="  ")]
    height = max(len(left), len(right))
    pairs = zip(left + [""] * (height - len(left)), right + [""] * (height - len(right)))
    return "\n".join(f"{one:<{WIDTHS[0]}} | {other}".rstrip() for one, other in pairs)


def test_there_are_at_least_forty_cases():
    assert len(CASES_BY_GIVEN) == len(CASES) >= 40
