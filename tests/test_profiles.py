"""Profiles: the published recipe, overrides that take or refuse, YAML files, and the package's lazy names."""

import ast
import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoConfig, Glm4Config, GlmConfig

import glm4_helpers
from glm4_helpers import evaluation, profiles
from glm4_helpers.checks import shapes
from glm4_helpers.cli import download
from glm4_helpers.cli import main as command_line
from glm4_helpers.cli.settings import settings_from_yaml
from glm4_helpers.machine import memory, room
from glm4_helpers.profiles import changes_weights, get_profile, profile_names, profile_settings
from glm4_helpers.support.errors import SettingError

PACKAGE = Path(glm4_helpers.__file__).parent


def test_default_is_nano_and_the_variable_chooses(monkeypatch):
    assert get_profile().name == "glm4-nano" == profile_names()[0]
    monkeypatch.setenv("GLM4_PROFILE", "glm-4-9b-lora")
    assert get_profile().name == "glm-4-9b-lora"
    assert get_profile("glm4-nano").name == "glm4-nano"


def test_nano_as_decided():
    nano = get_profile("glm4-nano")
    assert (nano.lora.r, nano.lora.alpha, nano.lora.dropout) == (8, 32, 0.0)
    assert nano.lora.target_modules == ("q_proj", "k_proj", "v_proj")
    assert (nano.training.per_device_batch_size, nano.training.epochs) == (8, 3)
    assert (nano.training.learning_rate, nano.training.max_length) == (2e-3, 512)
    assert nano.training.padding_free


def test_the_9b_follows_the_published_recipe():
    profile = get_profile("glm-4-9b-lora")
    assert (profile.hub_id, profile.modelscope_id) == ("zai-org/glm-4-9b-hf", "ZhipuAI/glm-4-9b-hf")
    assert (profile.architecture, profile.dtype) == ("GlmForCausalLM", "bfloat16")
    assert dataclasses.astuple(profile.lora) == (8, 32, 0.1, ("q_proj", "k_proj", "v_proj"))
    training = profile.training
    assert (training.epochs, training.per_device_batch_size, training.evaluation_batch_size) == (3, 2, 4)
    assert (training.learning_rate, training.lr_scheduler, training.max_length) == (5e-4, "linear", 512)
    assert (training.evaluations_per_run, profile.dev_fraction) == (10, 0.05)
    assert training.padding_free and training.gradient_checkpointing, (
        "ours: the same losses with fewer tokens, and less memory"
    )
    assert profile.sample_prompts == ("你好，告诉我你的名字。", "告诉我1+2等于多少？")


def test_relatives_differ_where_they_should():
    assert get_profile("glm-4-9b-qlora").quantization == "nf4"
    assert get_profile("glm-4-9b-0414").architecture == "Glm4ForCausalLM"
    full = get_profile("glm-4-9b-full")
    assert full.lora is None and full.training.learning_rate == 5e-5


@pytest.mark.parametrize("name", profile_names())
def test_settings_survive_json_and_give_the_profile_again(name):
    settings = profile_settings(get_profile(name))
    assert json.loads(json.dumps(settings)) == settings
    assert settings["name"] == name
    assert get_profile(**settings) == get_profile(name)


def test_glm_4_9b_has_the_shape_of_its_architectures_defaults():
    for name, defaults in (("glm-4-9b-lora", GlmConfig()), ("glm-4-9b-0414", Glm4Config())):
        profile = get_profile(name)
        assert AutoConfig.for_model(**profile.shape).to_dict() == defaults.to_dict()


def test_no_other_module_asks_which_profile_it_has():
    """All that is special about a model is in its profile, so that a new model is one more entry there."""
    others = [module for module in PACKAGE.rglob("*.py") if module.stem != "profiles"]
    trees = [ast.parse(module.read_text(encoding="utf-8")) for module in others]
    compared = [ast.unparse(node) for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    assert [text for text in compared if re.search(r"profile\.(name|title|base_model|hub_id)\b(?! is)", text)] == []


def test_a_new_model_is_one_entry(tmp_path, monkeypatch):
    """Its needs, its modules, its chat model and the refusal of its old names come from the entry alone."""
    entry = dataclasses.replace(
        get_profile("glm-4-9b-lora"),
        name="glm-small",
        base_model="weights/glm-small",
        hub_id="owner/glm-small",
        shape={**get_profile("glm-4-9b-lora").shape, "num_hidden_layers": 2, "hidden_size": 512},
        chat_model="weights/glm-small-chat",
        old_names=("glm-small-v1",),
    )
    monkeypatch.setattr(profiles, "_PROFILES", (*profiles._PROFILES, entry))
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    chat = tmp_path / "weights" / "glm-small-chat"
    chat.mkdir(parents=True)
    (chat / "config.json").write_text("{}")

    profile = get_profile("glm-small")
    assert profile == entry and "glm-small" in command_line.profile_lines()
    counted = sum(weight.numel() for weight in shapes.meta_model(profile).parameters())
    assert memory.published_shape(profile).parameters == counted < 10**9
    assert 0 < room.needs(profile).gpu_memory_gib < room.needs(get_profile("glm-4-9b-lora")).gpu_memory_gib / 4
    assert evaluation.find_baseline(profile) == chat
    with pytest.raises(SettingError, match="old format") as refused:
        download.refuse_old_name("anyone/GLM-small-v1")
    assert refused.value.fix == "Use anyone/GLM-small-v1-hf."


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "configs").glob("train_*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_read(path):
    assert get_profile(**settings_from_yaml(path)).name in profile_names()


def test_changed_weights_are_told_from_settings_without_effect():
    without = ("title", "train_data", "dev_data", "test_data", "sample_prompts", "chat_model", "max_new_tokens")
    assert not any(map(changes_weights, without))
    assert all(
        map(changes_weights, ("training.seed", "lora.r", "terminator", "dev_fraction", "data.train", "training.gone"))
    )


def test_overrides_dotted_and_nested_leave_the_rest():
    profile = get_profile("glm4-nano", **{"training.epochs": 1, "lora": {"r": 4}, "terminator": "<|user|>"})
    assert (profile.training.epochs, profile.lora.r, profile.terminator) == (1, 4, "<|user|>")
    assert profile.lora.alpha == 32 and get_profile("glm4-nano").training.epochs == 3


def test_lists_become_tuples_and_whole_numbers_pass_for_fractions():
    profile = get_profile(**{"lora.target_modules": ["o_proj"], "lora.dropout": 0, "lora.alpha": 8})
    assert profile.lora.target_modules == ("o_proj",) and profile.lora.dropout == 0


def test_full_fine_tuning_by_override():
    assert get_profile("glm4-nano", lora=None).lora is None


@pytest.mark.parametrize(
    ("overrides", "problem", "fix"),
    [
        ({"trainin.epochs": 1}, "'trainin.epochs'", "Did you mean training.epochs?"),
        ({"learning_rate": 1e-3}, "'learning_rate'", "Did you mean training.learning_rate?"),
        ({"training": {"epoch": 1}}, "'training.epoch'", "Did you mean training.epochs?"),
        ({"training.lr": 1}, "'training.lr'", "training.learning_rate"),
        ({"name": "x"}, "profile 'x'", "glm4-nano"),
        ({"training.epochs": "3"}, "training.epochs can't be '3'", "a number"),
        ({"training.padding_free": 1}, "training.padding_free can't be 1", "true or false"),
        ({"training.seed": True}, "training.seed can't be True", "a whole number"),
        ({"training.max_length": 1.5}, "training.max_length", "a whole number"),
        ({"training.early_stopping_patience": 0}, "training.early_stopping_patience", "at least 1, or null"),
        ({"training.seed": 2**32}, "training.seed", "from 0 to 4294967295"),
        ({"training.weight_decay": float("inf")}, "training.weight_decay can't be inf", "at least 0"),
        ({"training.learning_rate": float("nan")}, "training.learning_rate can't be nan", "above 0"),
        ({"training.evaluations_per_run": -1}, "training.evaluations_per_run", "at least 0"),
        ({"lora.target_modules": "all-linear"}, "lora.target_modules", "[q_proj, v_proj]"),
        ({"lora.target_modules": "q_proj,v_proj"}, "'q_proj,v_proj'", "--set 'lora.target_modules=[q_proj, v_proj]'"),
        ({"lora.target_modules": []}, "lora.target_modules", "at least one name"),
        ({"lora.target_modules": ["q_proj", "v_proj", "q_proj"]}, "lora.target_modules", "each of them once"),
        ({"sample_prompts": "你好"}, "sample_prompts can't be '你好'", "a list of texts"),
        ({"train_data": None}, "train_data can't be None", "text"),
        ({"shape": None}, "no setting 'shape'", ""),
        ({"dtype": "float16"}, "dtype can't be 'float16'", "NaN"),
        ({"quantization": "int8"}, "quantization", "nf4"),
        ({"training.learning_rate": -1e-3}, "training.learning_rate", "above 0"),
        ({"dev_fraction": 1.0}, "dev_fraction", "not including, 1"),
        ({"training.per_device_batch_size": 0}, "per_device_batch_size", "at least 1"),
        ({"lora": 8}, "lora can't be 8", "lora.r=8"),
        ({"training": None}, "training can't be None", "training.epochs=1"),
    ],
)
def test_wrong_overrides_are_refused_with_a_fix(overrides, problem, fix):
    with pytest.raises(SettingError) as caught:
        get_profile(**overrides)
    assert problem in caught.value.problem and fix in caught.value.fix


def test_unknown_profile_names_the_nearest(monkeypatch):
    monkeypatch.setenv("GLM4_PROFILE", "glm4-nono")
    with pytest.raises(SettingError) as caught:
        get_profile()
    assert caught.value.fix == "Did you mean glm4-nano?"


def test_lora_settings_of_a_full_profile_are_refused():
    with pytest.raises(SettingError, match="without LoRA"):
        get_profile("glm-4-9b-full", **{"lora.r": 4})


def test_yaml_becomes_a_profile(tmp_path):
    path = tmp_path / "run.yaml"
    text = "profile: glm-4-9b-lora\ntraining:\n  learning_rate: 1e-4\n  epochs: 1\nlora.target_modules: [q_proj]\n"
    path.write_text(text)
    profile = get_profile(**settings_from_yaml(path))
    assert (profile.name, profile.training.learning_rate, profile.training.epochs) == ("glm-4-9b-lora", 1e-4, 1)
    assert profile.lora.target_modules == ("q_proj",)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("training:\n  epoch: 1\n", "training.epoch"),
        ("training:\n  epochs: three\n", "training.epochs"),
        ("profile: glm\n", "'glm'"),
        ("profile: [glm4-nano]\n", "glm4-nano"),
        ("lora.target_modules: q_proj\n", "lora.target_modules"),
        ("- a\n- b\n", "no settings"),
        ("", "no settings"),
        ("a: [1\n", "not YAML"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingError) as caught:
        settings_from_yaml(path)
    assert str(path) in caught.value.problem and said in caught.value.problem


def test_absent_yaml_is_said(tmp_path):
    with pytest.raises(SettingError, match="can't be read"):
        settings_from_yaml(tmp_path / "gone.yaml")


@pytest.mark.parametrize("name", sorted(glm4_helpers._HOMES))
def test_every_lazy_name_is_defined_in_its_module(name):
    home = PACKAGE.joinpath(*glm4_helpers._HOMES[name].split("."))
    module = home / "__init__.py" if home.is_dir() else home.with_suffix(".py")
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        names |= {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
        names |= {target.id for target in getattr(node, "targets", ()) if isinstance(target, ast.Name)}
        names |= {alias.name for alias in node.names} if home.is_dir() and isinstance(node, ast.ImportFrom) else set()
    assert name in names


def test_lazy_names_and_modules_resolve():
    assert glm4_helpers.get_profile is get_profile
    assert glm4_helpers.profiles is profiles
    assert {"get_profile", "chat_format"} <= set(dir(glm4_helpers))
    with pytest.raises(AttributeError):
        glm4_helpers.no_such_name


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, glm4_helpers, glm4_helpers.profiles, glm4_helpers.chat_format, glm4_helpers.data\n"
        "heavy = {'torch', 'transformers', 'trl', 'peft', 'datasets', 'numpy', 'swanlab', 'matplotlib', 'yaml'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent)
    assert done.stdout.strip() == "[]"
