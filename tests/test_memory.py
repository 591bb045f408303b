"""The memory arithmetic: against built models, against what autograd keeps, and in what it refuses."""

import json

import pytest

from glm4_helpers import memory
from glm4_helpers.__main__ import main
from glm4_helpers.errors import MachineError, ModelError, SettingError
from glm4_helpers.profiles import get_profile

REAL = ("glm-4-9b-lora", "glm-4-9b-0414", "glm-edge-1.5b", "glm-4-9b-full")


@pytest.fixture(autouse=True)
def _empty_course(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))


@pytest.mark.parametrize("name", REAL)
def test_counted_parameters_are_those_of_the_model(name):
    from glm4_helpers import models

    profile = get_profile(name)
    model = models.meta_model(profile)
    assert memory.shape_of(model.config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_published_shapes_are_those_of_the_configs(name):
    from glm4_helpers import models

    profile = get_profile(name)
    assert memory.published_shape(profile) == memory.shape_of(models.model_config(profile))


def test_a_model_of_unknown_shape_is_refused():
    with pytest.raises(ModelError, match="glm4-nano is not known"):
        memory.published_shape(get_profile("glm4-nano"))


@pytest.mark.parametrize("name", ["glm-4-9b-lora", "glm-4-9b-0414", "glm-edge-1.5b"])
def test_counted_adapter_is_the_one_that_peft_builds(name):
    from peft import get_peft_model

    from glm4_helpers import models, training

    profile = get_profile(name)
    model = get_peft_model(models.meta_model(profile), training.lora_config(profile), low_cpu_mem_usage=True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert memory.lora_parameters(memory.shape_of(model.config), profile) == trained


def small_config(kind="glm", layers=2):
    from transformers import Glm4Config, GlmConfig

    return {"glm": GlmConfig, "glm4": Glm4Config}[kind](
        vocab_size=500, hidden_size=256, intermediate_size=800, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=32, pad_token_id=0, eos_token_id=[1],
    )  # fmt: skip


def kept_by_autograd(config, profile, autocast, tokens=64):
    """Bytes a token that autograd keeps, without the weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from glm4_helpers import training

    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").train()
    backbone = model.model
    if profile.lora is not None:
        backbone = get_peft_model(model, training.lora_config(profile)).get_base_model().model
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            # The tensor itself is kept too, so that its address is not given to another one.
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.zeros((1, tokens), dtype=torch.long)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backbone(input_ids=ids, use_cache=False).last_hidden_state
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel() >= tokens) / tokens


@pytest.mark.parametrize("kind", ["glm", "glm4"])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("changes", [{}, {"lora.dropout": 0.0}, "full"], ids=["LoRA", "no dropout", "full"])
def test_activations_are_what_autograd_keeps_of_a_layer(kind, device, changes):
    full = changes == "full"
    profile = get_profile("glm-4-9b-full") if full else get_profile("glm-4-9b-lora", **changes)
    setting = memory.setting_of(profile, device=device)
    kept = [kept_by_autograd(small_config(kind, layers), profile, device == "gpu") for layers in (2, 3)]
    counted = memory.layer_bytes(memory.shape_of(small_config(kind)), profile, setting)
    # LoRA's own matrices and the angles of rotary positions are shared or tiny, and not counted.
    assert counted == pytest.approx(kept[1] - kept[0], rel=0.06)


def test_the_9b_has_the_published_weights():
    parts = memory.estimate(get_profile("glm-4-9b-lora")).by_part()
    assert parts["weights"] == 2 * 9_399_951_360
    assert parts["adapter"] == 4 * 5_406_720
    assert parts["optimizer"] == 2 * parts["gradients"] == 8 * 5_406_720


def test_of_mapped_weights_the_embedding_table_is_not_resident():
    profile = get_profile("glm-4-9b-lora")
    on_cpu = memory.estimate(profile, memory.setting_of(profile, device="cpu")).by_part()
    assert on_cpu["weights"] == 2 * (9_399_951_360 - 151_552 * 4096)
    full = get_profile("glm-4-9b-full")
    assert memory.estimate(full, memory.setting_of(full, device="cpu")).by_part()["weights"] == 2 * 9_399_951_360


def test_double_quantization_takes_the_published_bits():
    profile = get_profile("glm-4-9b-qlora")
    linear = memory.shape_of(small_config()).linear
    parts = memory.estimate(profile, config=small_config()).by_part()
    assert 8 * parts["quantization constants"] / linear == pytest.approx(0.127, abs=0.001)


def test_zero_divides_what_its_stage_names():
    profile = get_profile("glm-4-9b-full")
    stages = [
        memory.estimate(profile, memory.setting_of(profile, gpus=8, zero_stage=stage)).by_part() for stage in (1, 2, 3)
    ]
    count = 9_399_951_360
    assert [parts["weights"] for parts in stages] == [2 * count, 2 * count, count // 4]
    assert [parts["gradients"] for parts in stages] == [2 * count, count // 4, count // 4]
    assert [parts["optimizer"] for parts in stages] == [12 * count // 8] * 3
    assert [parts["communication bucket"] for parts in stages] == [2_000_000_000, 1_000_000_000, 1_000_000_000]


@pytest.mark.parametrize("gib", [20, 24, 40, 80])
def test_the_largest_batch_fits_and_one_more_does_not(gib):
    profile = get_profile("glm-4-9b-lora")
    batch = memory.largest_batch(profile, gib)
    assert batch >= 1
    fits, fails = (memory.estimate(profile, memory.setting_of(profile, batch_size=size)) for size in (batch, batch + 1))
    assert fits.total_gib <= gib < fails.total_gib


def test_too_little_memory_is_refused_with_numbers_and_what_fits():
    with pytest.raises(MachineError, match=r"needs about \d+\.\d GiB; 16\.0 GiB are there") as error:
        memory.require_memory(get_profile("glm-4-9b-lora"), 16)
    assert "nf4" in error.value.fix and "glm-4-9b-qlora" in error.value.fix


def test_the_nearest_setting_keeps_what_it_can():
    profile = get_profile("glm-4-9b-lora", **{"training.gradient_checkpointing": False})
    near = memory.nearest_fit(profile, 24)
    assert near.length == 512 and near.quantization is None
    assert memory.estimate(profile, near).total_gib <= 24


def test_no_setting_at_all_is_said():
    with pytest.raises(MachineError, match="smaller profile"):
        memory.require_memory(get_profile("glm-4-9b-lora"), 2)


@pytest.mark.parametrize("changes", [{"batch_size": 0}, {"zero_stage": 4}, {"zero_stage": 3, "quantization": "nf4"}])
def test_settings_out_of_range_are_refused(changes):
    with pytest.raises(SettingError):
        memory.setting_of(get_profile("glm-4-9b-lora"), **changes)


def test_the_command_prints_parts_formulas_and_the_largest_batch(capsys):
    assert main(["memory", "--profile", "glm-4-9b-lora", "--formulas", "--gpu-memory", "24"]) == 0
    out = capsys.readouterr().out
    assert "9,399,951,360 parameters x 2 bytes" in out and "arXiv" in out and "Largest batch in 24 GiB" in out


def test_the_command_prints_json(capsys):
    assert main(["memory", "--profile", "glm-4-9b-qlora", "--gpu-memory", "16", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["largest_batch"] >= 1
    assert figures["total_bytes"] == sum(part["bytes"] for part in figures["parts"])


def test_every_part_names_its_formula_and_source():
    for name in REAL:
        for part in memory.estimate(get_profile(name)).parts:
            assert part.formula and part.source
