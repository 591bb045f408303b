"""The memory arithmetic: against built models, against what autograd keeps, and in what it refuses."""

import dataclasses
import json
import random
import types
from pathlib import Path

import pytest

from benchmarks import cpu_memory
from glm4_helpers.checks import shapes
from glm4_helpers.cli.main import main
from glm4_helpers.cli.settings import settings_from_yaml
from glm4_helpers.machine import gpus, memory, room
from glm4_helpers.profiles import get_profile, profile_names
from glm4_helpers.support.errors import MachineError, ModelError, SettingError

ROOT = Path(__file__).parent.parent

REAL = tuple(name for name in profile_names() if get_profile(name).shape)


@pytest.fixture(autouse=True)
def _empty_course(tmp_path, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))


@pytest.mark.parametrize("name", REAL)
def test_counted_parameters_are_those_of_the_model(name):

    profile = get_profile(name)
    model = shapes.meta_model(profile)
    assert memory.shape_of(model.config).parameters == sum(weight.numel() for weight in model.parameters())


@pytest.mark.parametrize("name", REAL)
def test_published_shapes_are_those_of_the_configs(name):

    profile = get_profile(name)
    assert memory.published_shape(profile) == memory.shape_of(shapes.model_config(profile))


def test_a_model_of_unknown_shape_is_refused():
    with pytest.raises(ModelError, match="glm4-nano is not known"):
        memory.published_shape(get_profile("glm4-nano"))


@pytest.mark.parametrize("name", ["glm-4-9b-lora", "glm-4-9b-0414", "glm-edge-1.5b"])
def test_counted_adapter_is_the_one_that_peft_builds(name):
    from peft import get_peft_model

    from glm4_helpers import training

    profile = get_profile(name)
    model = get_peft_model(shapes.meta_model(profile), training.lora_config(profile), low_cpu_mem_usage=True)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    assert memory.lora_parameters(memory.shape_of(model.config), profile) == trained


def small_config(kind="glm", layers=2):
    from transformers import Glm4Config, GlmConfig

    return {"glm": GlmConfig, "glm4": Glm4Config}[kind](
        vocab_size=500,
        hidden_size=256,
        intermediate_size=800,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        pad_token_id=0,
        eos_token_id=[1],
    )


def kept_by_autograd(config, profile, autocast, **inputs):
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

    tokens = inputs["input_ids"].numel()
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        backbone(**inputs, use_cache=False).last_hidden_state
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel() >= tokens) / tokens


def batch_of(kind):
    """Inputs of 128 tokens: one row, two rows of which one is padded, or two rows joined."""
    import torch

    ids = torch.zeros((1, 128), dtype=torch.long)
    if kind == "one row":
        return {"input_ids": ids}
    if kind == "joined":
        return {"input_ids": ids, "position_ids": torch.arange(64).repeat(2)[None]}
    mask = torch.ones((2, 64), dtype=torch.long)
    mask[0, :5] = 0
    return {"input_ids": ids.view(2, 64), "attention_mask": mask}


@pytest.mark.parametrize("kind", ["glm", "glm4"])
@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("batch", ["one row", "padded", "joined"])
@pytest.mark.parametrize("changes", [{}, {"lora.dropout": 0.0}, "full"], ids=["LoRA", "no dropout", "full"])
def test_activations_are_what_autograd_keeps_of_a_layer(kind, device, batch, changes, monkeypatch):
    import torch

    full = changes == "full"
    profile = get_profile("glm-4-9b-full") if full else get_profile("glm-4-9b-lora", **changes)
    rows = 1 if batch == "one row" else 2
    setting = memory.setting_of(profile, batch_size=rows, length=128 // rows, padding_free=batch == "joined")
    if device == "gpu":  # what dropout runs on CUDA (ATen/native/Dropout.cpp); a CPU has it too, but takes another way
        native = torch.native_dropout
        monkeypatch.setattr(torch.nn.functional, "dropout", lambda x, p, training, inplace: native(x, p, training)[0])
    kept = [
        kept_by_autograd(small_config(kind, layers), profile, device == "gpu", **batch_of(batch)) for layers in (2, 3)
    ]
    counted = (memory if device == "gpu" else cpu_memory).layer_bytes(
        memory.shape_of(small_config(kind)), profile, setting
    )
    # LoRA's own matrices and the angles of rotary positions are shared or tiny, and not counted.
    assert counted == pytest.approx(kept[1] - kept[0], rel=0.03)


def test_the_9b_has_the_published_weights():
    parts = memory.estimate_memory(get_profile("glm-4-9b-lora")).by_part()
    assert parts["weights"] == 2 * 9_399_951_360
    assert parts["adapter"] == 4 * 5_406_720
    assert parts["optimizer"] == 2 * parts["gradients"] == 8 * 5_406_720


def test_of_mapped_weights_the_embedding_table_is_not_resident():
    lora, full = get_profile("glm-4-9b-lora"), get_profile("glm-4-9b-full")
    mapped, loaded = (
        cpu_memory.estimate(each, memory.setting_of(each), memory.published_shape(each)).by_part()
        for each in (lora, full)
    )
    assert mapped["weights"] == 2 * (9_399_951_360 - 151_552 * 4096)
    assert loaded["weights"] == 2 * 9_399_951_360
    assert mapped["libraries"] == memory.CPU_LIBRARY_BYTES


def test_double_quantization_takes_the_published_bits():
    profile = get_profile("glm-4-9b-qlora")
    linear = memory.shape_of(small_config()).linear
    parts = memory.estimate_memory(profile, config=small_config()).by_part()
    assert 8 * parts["quantization constants"] / linear == pytest.approx(0.127, abs=0.001)


def test_zero_divides_what_its_stage_names():
    profile = get_profile("glm-4-9b-full")
    stages = [
        memory.estimate_memory(profile, memory.setting_of(profile, gpus=8, zero_stage=stage)).by_part()
        for stage in (1, 2, 3)
    ]
    count = 9_399_951_360
    assert [parts["weights"] for parts in stages] == [2 * count, 2 * count, count // 4]
    assert [parts["gradients"] for parts in stages] == [2 * count, count // 4, count // 4]
    assert [parts["optimizer"] for parts in stages] == [12 * count // 8] * 3
    assert [parts["communication bucket"] for parts in stages] == [2_000_000_000, 1_000_000_000, 1_000_000_000]


@pytest.mark.parametrize(
    ("stage", "gpus", "elements"), [(3, 8, 10**9), (3, 16, 9_399_951_360 // 16), (2, 8, 9_399_951_360 // 8)]
)
def test_deepspeed_s_step_takes_its_gradients_twice_more(stage, gpus, elements):
    """Copied into one bfloat16 array and into float32: a sub-group of 1e9 with ZeRO-3, else all that a GPU has."""
    profile = get_profile("glm-4-9b-full")
    parts = memory.estimate_memory(profile, memory.setting_of(profile, gpus=gpus, zero_stage=stage)).by_part()
    backward = sum(parts.get(name, 0) for name in ("activations", "logits", "a layer beyond logits"))
    assert backward + parts.get("a step beyond backward", 0) == max(backward, 6 * elements)
    assert "a step beyond backward" not in memory.estimate_memory(profile).by_part()


def test_without_triton_the_logits_are_copied():
    profile = get_profile("glm-4-9b-lora")
    with_it, without = (
        memory.estimate_memory(profile, memory.setting_of(profile, triton=each)).by_part() for each in (True, False)
    )
    assert without["logits"] - with_it["logits"] == 1024 * 32_768 * 29


def published_lengths(count=42_000):
    """Tokens of rows as Alpaca-GPT4 in Chinese has them: mean about 150, none above 512."""
    draw = random.Random(0)
    drawn = (max(20, int(draw.lognormvariate(4.83, 0.62))) for _ in range(count))
    return [length for length in drawn if length <= 512]


def test_joined_rows_are_counted_as_they_are():
    lengths = (100,) * 30 + (500, 300)
    profile = get_profile("glm-4-9b-lora")
    setting = memory.setting_of(profile, batch_size=4, length=500, lengths=lengths)
    assert setting.tokens == 500 + 300 + 100 + 100
    assert memory.setting_of(profile, batch_size=4, length=500, lengths=lengths, padding_free=False).tokens == 4 * 500
    assert memory.setting_of(profile, batch_size=4, length=400, lengths=lengths).tokens == 300 + 3 * 100, (
        "longer rows are dropped"
    )
    assert memory.setting_of(profile, batch_size=64, length=500, lengths=lengths).tokens == sum(lengths)


def test_the_setting_for_80_gb_cards_fits_one(tmp_path, monkeypatch):
    """16 rows without checkpointing: 16 of the longest would not fit, but they never meet."""

    profile = get_profile(**settings_from_yaml(ROOT / "configs" / "train_9b_80gb.yaml"))
    assert memory.estimate_memory(profile).total_gib > 79
    monkeypatch.setattr(gpus, "default_device", lambda: types.SimpleNamespace(type="cuda"))
    monkeypatch.setattr(room, "_free_gib", lambda: 78.5)
    room.require_room(profile, tmp_path, published_lengths())
    with pytest.raises(MachineError, match="78.5 GiB are there"):
        room.require_room(profile, tmp_path, [512] * 42_000)


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_figures_of_the_pages_are_those_of_the_calculator(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in REAL:
        profile = get_profile(name)
        for setting in [{}] if profile.lora else [{}, {"gpus": 4, "zero_stage": 3}]:
            total = memory.estimate_memory(profile, memory.setting_of(profile, **setting)).total_gib
            rows = [
                line
                for line in text.splitlines()
                if line.startswith("|") and f"`{name}`" in line and f"{total:.1f} GiB" in line
            ]
            assert rows, f"{name} {setting}: {total:.1f} GiB"


@pytest.mark.parametrize("gib", [20, 24, 40, 80])
def test_the_largest_batch_fits_and_one_more_does_not(gib):
    profile = get_profile("glm-4-9b-lora")
    batch = memory.largest_batch(profile, gib)
    assert batch >= 1
    fits, fails = (
        memory.estimate_memory(profile, memory.setting_of(profile, batch_size=size)) for size in (batch, batch + 1)
    )
    assert fits.total_gib <= gib < fails.total_gib


def test_too_little_memory_is_refused_with_numbers_and_what_fits():
    with pytest.raises(MachineError, match=r"needs about \d+\.\d GiB; 16\.0 GiB are there") as error:
        memory.require_memory(get_profile("glm-4-9b-lora"), 16)
    assert "nf4" in error.value.fix and "glm-4-9b-qlora" in error.value.fix


def test_the_nearest_setting_keeps_what_it_can():
    profile = get_profile("glm-4-9b-lora", **{"training.gradient_checkpointing": False})
    near = memory.nearest_fit(profile, 24)
    assert near.length == 512 and near.quantization is None
    assert memory.estimate_memory(profile, near).total_gib <= 24


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
        for part in memory.estimate_memory(get_profile(name)).parts:
            assert part.formula and part.source


def test_float32_takes_twice_the_bytes_and_glm_edge_fits_a_t4_in_it():
    half, full = (memory.estimate_memory(get_profile("glm-edge-1.5b", dtype=name)) for name in ("bfloat16", "float32"))
    weights = [each.total_gib for each in (half, full)]
    assert full.parts[0].bytes == 2 * half.parts[0].bytes == 1_593_427_968 * 4
    assert 1.5 * weights[0] < weights[1] < 14.7


def test_a_shape_that_lacks_something_is_named():
    profile = get_profile("glm-edge-1.5b")
    without = {key: value for key, value in profile.shape.items() if key != "num_key_value_heads"}
    with pytest.raises(ModelError, match="shape of glm-edge-1.5b lacks num_key_value_heads"):
        memory.published_shape(dataclasses.replace(profile, shape=without))
