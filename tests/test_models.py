"""Loading, the checks on weights and adapters, and the tables, on a small random GLM and on GLM-4-9B's shape."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import save_model, tiny_glm, tiny_tokenizer
from transformers import AutoModelForCausalLM, Glm4Config, GlmConfig

from glm4_helpers import models, training
from glm4_helpers.checks import adapters, shapes, weights
from glm4_helpers.checks.chat_template import stop_ids
from glm4_helpers.generation import answers
from glm4_helpers.profiles import get_profile
from glm4_helpers.support.errors import ModelError, SettingError

TARGETS = ("q_proj", "k_proj", "v_proj")
ROOT = Path(__file__).parent.parent
QUESTION = [[{"role": "user", "content": "你好"}]]


@pytest.fixture
def profile(tmp_path, monkeypatch):
    """A profile whose base model is a small random GLM in a course folder of its own."""
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "weights" / "tiny", tiny_glm(tokenizer), tokenizer)
    return get_profile("glm4-nano", base_model="weights/tiny")


@pytest.fixture
def adapter(profile, tmp_path):
    """A live adapter for that base model, with its facts beside it."""
    return make_adapter(profile, tmp_path / "adapter")


def make_adapter(profile, folder, targets=TARGETS, live=True, facts=True):
    torch.manual_seed(1)
    config = LoraConfig(
        r=4, lora_alpha=32, target_modules=list(targets), init_lora_weights=not live, task_type="CAUSAL_LM"
    )
    get_peft_model(models.load_base_model(profile, "float32"), config).save_pretrained(folder)
    if facts:
        adapters.save_adapter_facts(folder, profile)
    return folder


def change_tensors(folder, change):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


# Loading


def test_the_tokenizer_pads_on_the_left_with_endoftext(profile):
    tokenizer = models.load_tokenizer(profile)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|endoftext|>")
    assert tokenizer.convert_ids_to_tokens(tokenizer("你")["input_ids"]) == ["[gMASK]", "<sop>", "你"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", torch.float32])
def test_the_base_model_loads_ready_to_answer(profile, dtype):
    model = models.load_base_model(profile, dtype)
    assert model.dtype == models.resolve_dtype(dtype)
    assert not model.training
    assert model.config._attn_implementation == "sdpa"
    assert model.generation_config.eos_token_id == stop_ids(models.load_tokenizer(profile))


def test_sampling_defaults_of_a_chat_model_raise_no_warning(profile, tmp_path, caplog):
    file = tmp_path / "weights" / "tiny" / "generation_config.json"
    shipped = {"do_sample": True, "temperature": 0.8, "top_p": 0.8, "max_length": 128000, "eos_token_id": [1]}
    file.write_text(json.dumps(shipped), encoding="utf-8")
    model, tokenizer = models.load_base_model(profile, "float32"), models.load_tokenizer(profile)
    answers(model, tokenizer, QUESTION, 5)
    assert caplog.records == []


@pytest.mark.parametrize("lora", [True, False])
def test_the_three_stop_ids_survive_a_trainer(profile, tmp_path, lora):
    """Set once when the model is loaded: building a trainer, training and saving leave them."""
    model, tokenizer = models.load_base_model(profile, "float32"), models.load_tokenizer(profile)
    expected = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|user|>", "<|observation|>"])
    steps = {} if lora else {"lora": None}
    settings = {"training.epochs": 1, "training.per_device_batch_size": 2, "training.evaluations_per_run": 1}
    small = get_profile("glm4-nano", base_model="weights/tiny", **settings, **steps)
    rows = Dataset.from_list([{"input_ids": [3, 4, 5, 6], "labels": [-100, 4, 5, expected[0]]}] * 4)
    trainer = training.build_trainer(model, tokenizer, rows, rows, small, tmp_path / "run")
    assert stop_ids_of(trainer.model) == expected
    trainer.train()
    assert stop_ids_of(trainer.model) == expected
    trainer.save_model(str(tmp_path / "saved"))
    if not lora:
        assert stop_ids_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == expected
    assert trainer.model.generation_config.pad_token_id == expected[0]


def stop_ids_of(model):
    assert model.config.eos_token_id == model.generation_config.eos_token_id
    return model.generation_config.eos_token_id


@pytest.mark.parametrize("name", ["int8", "bf16", "load"])
def test_an_unknown_dtype_is_refused(name):
    with pytest.raises(SettingError, match=name):
        models.resolve_dtype(name)


def damage_absent(folder):
    shutil.rmtree(folder)
    return "no folder"


def damage_no_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def damage_no_weights(folder):
    (folder / "model.safetensors").unlink()
    return "model.safetensors"


def damage_cut_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    return "is damaged or incomplete"


def damage_longer_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content + bytes(8))
    return "is damaged or incomplete"


def damage_header_of_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:8] + b"}" + content[9:])
    return "is damaged or incomplete"


def damage_lfs_pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return "Git LFS pointer"


def damage_missing_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    return "model-00002-of-00002"


def damage_empty_weights(folder):
    (folder / "model.safetensors").write_bytes(b"")
    return "is damaged or incomplete"


def damage_index_not_json(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "is not JSON"


def damage_index_without_files(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    return "names no files"


def damage_config_cut(folder):
    (folder / "config.json").write_text('{"model_type": "gl')
    return "config.json is not JSON"


def damage_tokenizer_cut(folder):
    (folder / "tokenizer.json").write_text("[]")
    return "tokenizer.json holds no settings"


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_weights_that_are_absent_or_damaged_are_named_with_a_fix(profile, tmp_path, damage):
    word = damage(tmp_path / "weights" / "tiny")
    with pytest.raises(ModelError, match=word) as raised:
        models.load_base_model(profile, "float32")
    assert "git checkout -- weights/tiny" in raised.value.fix


def test_absent_downloads_are_fixed_by_the_download_command(profile):
    with pytest.raises(ModelError) as raised:
        models.load_tokenizer(get_profile("glm-4-9b-lora"))
    assert "glm-4-9b-hf" in raised.value.problem
    assert "python -m glm4_helpers download --profile glm-4-9b-lora" in raised.value.fix


def test_an_absent_tokenizer_is_named(profile, tmp_path):
    (tmp_path / "weights" / "tiny" / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="tokenizer.json"):
        models.load_tokenizer(profile)


# Fingerprints


def test_the_fingerprint_changes_with_weights_and_shape_only(profile, tmp_path):
    folder = tmp_path / "weights" / "tiny"
    first = weights.base_fingerprint(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_version": "9.9", "eos_token_id": 1}))
    assert weights.base_fingerprint(folder) == first
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))
    assert weights.base_fingerprint(folder) != first
    tokenizer = tiny_tokenizer()
    save_model(folder, tiny_glm(tokenizer, seed=7), tokenizer)
    assert weights.base_fingerprint(folder) != first


def as_transformers_4_writes_it(config):
    """rope_parameters in parts, the dtype by its older name, and no bos_token_id where there is none."""
    rope = config["rope_parameters"]
    kept = {key: value for key, value in config.items() if key not in ("rope_parameters", "dtype", "bos_token_id")}
    parts = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor")} | {"rope_scaling": None}
    return kept | parts | {"torch_dtype": config["dtype"], "transformers_version": "4.57.0"}


def test_the_fingerprint_is_the_same_whichever_transformers_wrote_the_config(profile, tmp_path):
    """The old keys may also lie beside the new ones. Another rotary base or share is another model."""
    folder = tmp_path / "weights" / "tiny"
    config = json.loads((folder / "config.json").read_text())
    first = weights.base_fingerprint(folder)

    def after(changed):
        (folder / "config.json").write_text(json.dumps(changed))
        return weights.base_fingerprint(folder)

    older = as_transformers_4_writes_it(config)
    assert after(older) == after({**older, **config}) == first
    assert after(older | {"rope_theta": 500000.0}) != first
    assert after(older | {"partial_rotary_factor": 1.0}) != first
    assert after(older | {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}) != first


def test_the_fingerprint_of_nano_is_that_of_adapters_made_before():
    assert weights.base_fingerprint(ROOT / "weights" / "glm4-nano") == "edf48fbe2b9ebdd8"


# Adapters


def test_a_live_adapter_changes_answers_and_switches_off(profile, adapter):
    base, tokenizer = models.load_base_model(profile, "float32"), models.load_tokenizer(profile)
    before = answers(base, tokenizer, QUESTION, 20)
    model = models.load_adapter(base, adapter, profile)
    on = answers(model, tokenizer, QUESTION, 20)
    with models.adapter_off(model) as plain:
        off = answers(plain, tokenizer, QUESTION, 20)
    assert off == before != on
    assert answers(model, tokenizer, QUESTION, 20) == on
    assert not model.training


def test_a_load_leaves_no_warning_standing(profile, adapter, recwarn):
    base = models.load_base_model(profile, "float32")
    recwarn.clear()
    models.load_adapter(base, adapter, profile)
    assert [str(warning.message) for warning in recwarn] == []


def test_adapter_off_lets_a_base_model_pass(profile):
    model = models.load_base_model(profile, "float32")
    with models.adapter_off(model) as same:
        assert same is model


def refused(profile, folder, word):
    """The message for this adapter; the base model must come out of it unchanged."""
    base = models.load_base_model(profile, "float32")
    with pytest.raises(ModelError, match=word):
        models.load_adapter(base, folder, profile)
    assert not any("lora_" in name for name, _ in base.named_parameters())


def test_an_absent_adapter_is_refused(profile, tmp_path):
    refused(profile, tmp_path / "nowhere", "adapter_config.json is absent")


def test_an_interrupted_run_offers_its_checkpoints_by_name(profile, tmp_path, monkeypatch):
    make_adapter(profile, tmp_path / "run" / "checkpoints" / "checkpoint-20")
    monkeypatch.chdir(tmp_path)
    for given in ("run", "run/adapter"):
        refused(profile, tmp_path / given, "no adapter in .*, but there are checkpoints: checkpoint-20")


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank_pattern", {"q_proj": 16}), ("layers_to_transform", [0]), ("modules_to_save", ["lm_head"])],
)
def test_options_of_peft_that_are_not_read_are_named(profile, adapter, option, value):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), option: value}))
    refused(profile, adapter, f"PEFT's {option}, which this course does not read")


def test_an_adapter_cut_in_writing_is_refused(profile, adapter):
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    refused(profile, adapter, "is damaged or incomplete")


def test_an_adapter_that_was_never_trained_is_refused(profile, tmp_path):
    refused(profile, make_adapter(profile, tmp_path / "adapter", live=False), "not live")


def test_one_matrix_of_zeros_is_enough_to_be_refused(profile, adapter):
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_B.weight"
    change_tensors(adapter, lambda tensors: tensors[name].zero_())
    refused(profile, adapter, "layers.1.self_attn.v_proj.lora_B is all zeros")


def test_nan_is_refused(profile, adapter):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors[name].fill_(float("nan")))
    refused(profile, adapter, "NaN")


def test_a_missing_module_is_refused(profile, adapter):
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    change_tensors(adapter, lambda tensors: tensors.pop(name))
    refused(profile, adapter, "lacks model.layers.1.self_attn.v_proj.lora_A")


def test_fewer_targets_than_the_profile_are_refused(profile, tmp_path):
    refused(profile, make_adapter(profile, tmp_path / "adapter", targets=["q_proj"]), "changes 2 modules.*expects 6")


def test_other_modules_than_the_profile_s_are_refused(profile, tmp_path):
    folder = make_adapter(profile, tmp_path / "adapter", targets=["o_proj", "gate_up_proj", "down_proj"])
    refused(profile, folder, "changes 6 modules .*expects 6")


def test_targets_may_be_a_pattern_as_in_peft(profile, adapter):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"target_modules": r".*self_attn\.(q|k|v)_proj"}))
    assert models.load_adapter(models.load_base_model(profile, "float32"), adapter, profile)


def test_switching_off_leaves_gradients_as_they_were(profile, adapter):
    model = models.load_adapter(models.load_base_model(profile, "float32"), adapter, profile)
    before = [weight.requires_grad for weight in model.parameters()]
    with models.adapter_off(model):
        pass
    assert [weight.requires_grad for weight in model.parameters()] == before


def test_targets_that_match_nothing_are_refused(profile, adapter):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"target_modules": ["q_proj", "gate_proj"]}))
    refused(profile, adapter, "gate_proj")


def test_an_adapter_of_other_weights_is_refused(profile, adapter, tmp_path):
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "weights" / "tiny", tiny_glm(tokenizer, seed=7), tokenizer)
    refused(profile, adapter, "other base weights")


def test_without_facts_an_adapter_is_judged_by_its_shapes(profile, tmp_path):
    folder = make_adapter(profile, tmp_path / "adapter", facts=False)
    with pytest.warns(UserWarning, match="judged by shapes"):
        assert isinstance(models.load_adapter(models.load_base_model(profile, "float32"), folder, profile), PeftModel)
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "weights" / "tiny", tiny_glm(tokenizer, hidden_size=64), tokenizer)
    with pytest.warns(UserWarning, match="judged by shapes"):
        refused(profile, folder, "does not fit")


def test_a_second_adapter_is_refused_until_the_first_is_off(profile, adapter):
    model = models.load_adapter(models.load_base_model(profile, "float32"), adapter, profile)
    with pytest.raises(ModelError, match="already carries"):
        models.load_adapter(model, adapter, profile)
    assert isinstance(models.load_adapter(model.unload(), adapter, profile), PeftModel)


# Shapes


def test_the_meta_model_of_glm_4_9b_has_its_published_size(profile):
    model = shapes.meta_model(get_profile("glm-4-9b-lora"))
    assert shapes.parameter_table(model)[-1]["parameters"] == 9_399_951_360
    assert next(model.parameters()).device.type == "meta"


def test_lora_on_attention_of_9b_has_its_published_size():
    model = shapes.meta_model(GlmConfig())
    assert len(adapters.check_target_modules(model, TARGETS)) == 120
    model = get_peft_model(model, LoraConfig(r=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    rows = {row["part"]: row for row in shapes.parameter_table(model)}
    assert rows["adapter"]["parameters"] == rows["total"]["trainable"] == 5_406_720
    assert rows["adapter"]["share"] == pytest.approx(0.000575, rel=2e-3)
    assert rows["total"]["parameters"] == 9_399_951_360 + 5_406_720


def test_the_refresh_of_april_2025_has_an_architecture_of_its_own(profile):
    assert type(shapes.meta_model(get_profile("glm-4-9b-0414"))).__name__ == "Glm4ForCausalLM"
    assert adapters.check_target_modules(shapes.meta_model(Glm4Config()), TARGETS)


def test_a_shape_that_is_not_known_is_refused(profile):
    with pytest.raises(ModelError, match=r"no config\.json"):
        shapes.meta_model(get_profile("glm4-nano", base_model="weights/unknown"))


def test_gate_and_up_projections_match_nothing_and_are_refused():
    with pytest.raises(ModelError, match="gate_proj, up_proj") as raised:
        adapters.check_target_modules(shapes.meta_model(GlmConfig()), ["q_proj", "gate_proj", "up_proj"])
    assert "q_proj, k_proj, v_proj, o_proj, gate_up_proj, down_proj" in raised.value.fix


@pytest.mark.parametrize("targets", [[], None])
def test_no_targets_are_refused(targets):
    with pytest.raises(ModelError, match="nothing"):
        adapters.check_target_modules(tiny_glm(tiny_tokenizer()), targets)


def test_the_parameter_table_adds_up():
    model = tiny_glm(tiny_tokenizer())
    rows = shapes.parameter_table(model)
    assert [row["part"] for row in rows] == ["embeddings", "attention", "mlp", "norms", "lm_head", "total"]
    assert sum(row["parameters"] for row in rows[:-1]) == rows[-1]["parameters"] == model.num_parameters()
    assert rows[0]["parameters"] == model.config.vocab_size * 32


def test_the_structure_shows_each_layer_once_with_shapes_and_lora():
    model = shapes.meta_model(GlmConfig())
    text = shapes.structure(model)
    assert "layers x 40" in text
    assert text.count("q_proj  4096 -> 4096, bias") == 1
    assert "gate_up_proj  4096 -> 27392" in text
    assert "embed_tokens  Embedding, 151552 x 4096" in text
    model = get_peft_model(model, LoraConfig(r=8, target_modules=list(TARGETS), task_type="CAUSAL_LM"))
    adapted = shapes.structure(model)
    assert "k_proj  4096 -> 256, bias  + LoRA r=8 (34,816 parameters)" in adapted
    assert len(adapted.splitlines()) == len(text.splitlines())
