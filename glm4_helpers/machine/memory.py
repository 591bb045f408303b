"""How much GPU memory fine-tuning takes, worked out part by part from a model's shape, and which setting fits.

The peak is what stays (weights, what is trained, activations) and the largest of what comes and goes: logits, one layer
at work, the optimizer's step. Arithmetic only: no weights are read and nothing is measured. benchmarks/ measures.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from ..profiles import Profile
from ..support.errors import MachineError, ModelError, SettingError
from ..support.files import GIB

COMPUTE_BYTES = 2
"""Bytes of a bfloat16 number, in which all profiles above nano compute."""
LIBRARY_BYTES = int(0.8 * GIB)
"""CUDA context, cuBLAS and kernels on a GPU: a usual size, not measured in this project."""
CPU_LIBRARY_BYTES = int(0.092 * GIB)
"""What the libraries still take on a CPU once they are imported: measured with a model of nearly no size."""
LOGIT_COLUMNS, LOGIT_ROWS = 32_768, 4_096
"""Columns and rows of the logits that TRL 1.16 holds at a time (trl/kernels/chunked_logprob.py)."""
BUCKET_ELEMENTS, SUB_GROUP, LIVE_PARAMETERS = 500_000_000, 1_000_000_000, 1_000_000_000
"""DeepSpeed 0.19's reduce_bucket_size, sub_group_size and stage3_max_live_parameters (runtime/zero/config.py)."""


@dataclass(frozen=True)
class Setting:
    """What memory depends on besides the model. `batch_size` is rows a device, `length` tokens of the longest row.

    `padding_free` joins a batch's rows to one sequence. `lengths` are then the tokens of the rows there are; empty
    means that all may have `length`. `triton`: TRL's kernels run, as they do on Linux. On the device "cpu" they do not,
    and there is no CUDA context. `width` is bytes a number: 2 in bfloat16, 4 in float32.
    """

    batch_size: int
    length: int
    gradient_checkpointing: bool
    quantization: str | None = None
    gpus: int = 1
    zero_stage: int = 0
    padding_free: bool = False
    lengths: tuple[int, ...] = ()
    triton: bool = True
    device: str = "gpu"
    width: int = COMPUTE_BYTES

    @property
    def tokens(self) -> int:
        """Tokens of the largest batch: its rows joined, or all padded to the longest."""
        if self.padding_free and self.lengths:
            return batch_tokens(self.lengths, self.batch_size, self.length)
        return self.batch_size * self.length

    @property
    def masked(self) -> bool:
        """Whether attention needs a mask: where a batch has several rows, which are hardly ever of one length."""
        return self.batch_size > 1

    @property
    def sequence(self) -> int:
        """Tokens that attention sees at a time."""
        return self.tokens if self.padding_free else self.length


@cache
def batch_tokens(lengths: tuple[int, ...], rows: int, longest: int) -> int:
    """Tokens of the largest batch that joins `rows` rows of these lengths; those above `longest` are not trained on.

    The largest of many random batches, 20,000 where they are small: all of the longest rows never meet in one.
    """
    kept = [length for length in lengths if length <= longest] or [longest]
    batches = min(20_000, 1 + 2_000_000 // rows)
    drawn = iter(random.Random(0).choices(kept, k=batches * rows))
    return min(max(map(sum, zip(*[drawn] * rows))), sum(heapq.nlargest(rows, kept)))


@dataclass(frozen=True)
class Part:
    """One share of the peak: bytes on each device, the formula with its numbers, and where the formula is from."""

    name: str
    bytes: int
    formula: str
    source: str


@dataclass(frozen=True)
class Estimate:
    """The peak on each device while training."""

    profile: str
    setting: Setting
    parts: tuple[Part, ...]

    @property
    def total_bytes(self) -> int:
        """The sum of all parts."""
        return sum(part.bytes for part in self.parts)

    @property
    def total_gib(self) -> float:
        """The same in GiB."""
        return self.total_bytes / GIB

    def __str__(self) -> str:
        return format_estimate(self)

    def by_part(self) -> dict[str, int]:
        """Bytes by the name of the part, as `plots.memory_figure` takes them."""
        return {part.name: part.bytes for part in self.parts}

    def as_dict(self) -> dict[str, Any]:
        """The same as a dict that JSON can hold."""
        return {**dataclasses.asdict(self), "total_bytes": self.total_bytes, "total_gib": round(self.total_gib, 2)}


@dataclass(frozen=True)
class Shape:
    """The sizes of a GLM model that memory depends on. `query` and `key` are the widths of all their heads."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    query: int
    key: int
    attention_bias: bool
    tied: bool
    norms: int

    @property
    def attention(self) -> int:
        """Weights of one layer's attention: q, k, v and o."""
        return 2 * self.hidden * self.query + 2 * self.hidden * self.key

    @property
    def mlp(self) -> int:
        """Weights of one layer's fused gate and up projection and its down projection."""
        return 3 * self.hidden * self.intermediate

    @property
    def linear(self) -> int:
        """Weights of all linear modules inside the layers: what 4-bit quantization stores in 4 bits."""
        return self.layers * (self.attention + self.mlp)

    @property
    def kept(self) -> int:
        """All other parameters: embeddings, lm_head, biases and norms."""
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        biases = self.layers * (self.query + 2 * self.key) if self.attention_bias else 0
        return embeddings + biases + (self.layers * self.norms + 1) * self.hidden

    @property
    def looked_up(self) -> int:
        """Parameters of an embedding table that only single rows are read from; tied to lm_head there is none."""
        return 0 if self.tied else self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.linear + self.kept

    def lora_width(self, target: str) -> int:
        """Inputs plus outputs of one linear module, by which the size of its LoRA pair grows."""
        sizes = {
            "q_proj": self.hidden + self.query,
            "k_proj": self.hidden + self.key,
            "v_proj": self.hidden + self.key,
            "o_proj": self.query + self.hidden,
            "gate_up_proj": self.hidden + 2 * self.intermediate,
            "down_proj": self.intermediate + self.hidden,
        }
        if target not in sizes:
            raise SettingError(f"This model has no linear module {target!r}.", f"Use {', '.join(sizes)}.")
        return sizes[target]


def shape_of(config: Any) -> Shape:
    """The shape from a transformers config of `glm` or `glm4`. Glm4 has four norms a layer, Glm two."""
    head = config.head_dim
    return Shape(
        vocabulary=config.vocab_size,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        query=config.num_attention_heads * head,
        key=config.num_key_value_heads * head,
        attention_bias=bool(config.attention_bias),
        tied=bool(config.tie_word_embeddings),
        norms=4 if config.model_type == "glm4" else 2,
    )


def published_shape(profile: Profile) -> Shape:
    """The shape that the profile's model was published with, for a look at needs without loading any library.

    Raises ModelError for a profile without one, or with one that lacks something.
    """
    if profile.shape is None:
        raise ModelError(f"The shape of {profile.name} is not known here.", "Give its profile a shape in profiles.py.")
    try:
        return shape_of(SimpleNamespace(**profile.shape))
    except AttributeError as error:
        raise ModelError(
            f"The shape of {profile.name} lacks {error.name}.",
            "Add it in profiles.py; its name is that in config.json.",
        ) from None


def setting_of(profile: Profile, **changes: Any) -> Setting:
    """The profile's own setting, with some fields changed; None leaves one, quantization "none" switches it off.

    Raises SettingError for values out of range.
    """
    training = profile.training
    own = Setting(
        training.per_device_batch_size,
        training.max_length,
        training.gradient_checkpointing,
        profile.quantization,
        padding_free=training.padding_free,
        width=4 if profile.dtype == "float32" else COMPUTE_BYTES,
    )
    setting = dataclasses.replace(own, **{key: value for key, value in changes.items() if value is not None})
    if setting.quantization == "none":
        setting = dataclasses.replace(setting, quantization=None)
    for name, smallest in (("batch_size", 1), ("length", 1), ("gpus", 1), ("zero_stage", 0)):
        if getattr(setting, name) < smallest:
            raise SettingError(f"{name} can't be {getattr(setting, name)}.", f"Give {name} a value from {smallest}.")
    if setting.quantization and profile.lora is None:
        raise SettingError(
            f"{profile.name} trains all weights, and 4-bit weights can't be trained.",
            "Leave quantization out, or choose glm-4-9b-qlora.",
        )
    if setting.zero_stage > 3 or (setting.zero_stage == 3 and setting.quantization):
        raise SettingError(
            f"ZeRO stage {setting.zero_stage} can't be used here.",
            "Use 0 to 3; 4-bit weights can't be divided among GPUs, so take 0 to 2 with quantization.",
        )
    return setting


def estimate_memory(
    profile: Profile, setting: Setting | None = None, config: Any = None, layer: int | None = None
) -> Estimate:
    """The peak of memory on each device, part by part.

    `config` is a transformers config or a Shape; None takes the profile's model. `layer` are the bytes a token that
    autograd keeps of one layer; None takes `layer_bytes`, those of a GPU. Raises ModelError where the model's shape is
    not known here.
    """
    setting = setting or setting_of(profile)
    shape = config if isinstance(config, Shape) else _shape(profile, config)
    layer = layer_bytes(shape, profile, setting) if layer is None else layer
    logits = _logits(shape, setting, profile)
    backward = (_activations(shape, setting, layer), logits, _working(shape, setting, layer, logits.bytes))
    parts = (
        *_weights(shape, setting),
        *_trained(shape, setting, profile),
        *backward,
        *_step(shape, setting, profile, sum(part.bytes for part in backward)),
        *_constant(setting),
    )
    return Estimate(profile.name, setting, tuple(part for part in parts if part.bytes))


def _shape(profile: Profile, config: Any) -> Shape:
    from ..checks.shapes import model_config

    return shape_of(config or model_config(profile))


def largest_batch(profile: Profile, gib: float, setting: Setting | None = None, config: Any = None) -> int:
    """The largest batch, up to 4,096, that a device of `gib` GiB can train with; 0 where not even one row fits."""
    setting = setting or setting_of(profile)

    def needed(batch: int) -> float:
        return estimate_memory(profile, dataclasses.replace(setting, batch_size=batch), config).total_gib

    return bisect.bisect_right(range(1, 4097), gib, key=needed)


def nearest_fit(profile: Profile, gib: float, setting: Setting | None = None, config: Any = None) -> Setting | None:
    """The setting closest to the given one that fits in `gib` GiB, or None.

    What costs least is given up first: the batch, then checkpointing is switched on, then the length is halved (down
    to 128), last 4-bit weights are used.
    """
    setting = setting or setting_of(profile)
    for candidate in _cheaper(setting, profile):
        if estimate_memory(profile, candidate, config).total_gib <= gib:
            return candidate
    return None


def require_memory(profile: Profile, gib: float, setting: Setting | None = None, config: Any = None) -> Estimate:
    """The estimate, if it fits in `gib` GiB. Raises MachineError with the numbers and the nearest setting that fits."""
    setting = setting or setting_of(profile)
    needed = estimate_memory(profile, setting, config)
    if needed.total_gib <= gib:
        return needed
    near = nearest_fit(profile, gib, setting, config)
    fix = f"This fits: {describe(near)}." if near else "No setting of this profile fits: take a smaller profile."
    if near and near.quantization and not setting.quantization:
        fix += " (4-bit weights: --profile glm-4-9b-qlora, or --set quantization=nf4)"
    raise MachineError(
        f"{profile.name} with {describe(setting)} needs about {needed.total_gib:.1f} GiB; {gib:.1f} GiB are there.", fix
    )


def describe(setting: Setting) -> str:
    """The setting in words."""
    words = [f"batch {setting.batch_size}", f"{setting.length} tokens"]
    words.append("checkpointing" if setting.gradient_checkpointing else "no checkpointing")
    words += [setting.quantization] if setting.quantization else []
    words += [f"{setting.gpus} GPUs"] if setting.gpus > 1 else []
    words += [f"ZeRO-{setting.zero_stage}"] if setting.zero_stage else []
    return ", ".join(words)


def format_estimate(result: Estimate, sources: bool = False) -> str:
    """The estimate as a plain table; with `sources` the formulas and where they are from."""
    where = "process" if result.setting.device == "cpu" else "GPU"
    lines = [f"{result.profile}: {describe(result.setting)}; memory of each {where}", ""]
    for part in result.parts:
        lines.append(f"{part.name:<24}{part.bytes / GIB:>8.2f} GiB   {part.formula if sources else ''}".rstrip())
        lines += [f"{'':<38}{part.source}"] if sources else []
    return "\n".join([*lines, f"{'total':<24}{result.total_gib:>8.2f} GiB"])


# The parts


def _weights(shape: Shape, setting: Setting) -> Iterator[Part]:
    shards = setting.gpus if setting.zero_stage == 3 else 1
    if setting.quantization is None:
        yield Part(
            "weights",
            shape.parameters * setting.width // shards,
            f"{shape.parameters:,} parameters x {setting.width} bytes{_divided(shards)}",
            "in the profile's dtype; ZeRO-3 divides them (arXiv 1910.02054, section 5.3)",
        )
        return
    yield Part(
        "weights",
        shape.linear // 2 + shape.kept * COMPUTE_BYTES,
        f"{shape.linear:,} in layers x 1/2 byte + {shape.kept:,} others x 2 bytes",
        "NF4 holds a weight in 4 bits; embeddings and lm_head stay bfloat16 (QLoRA, arXiv 2305.14314, section 3)",
    )
    yield Part(
        "quantization constants",
        shape.linear // 64 + shape.linear * 4 // (64 * 256),
        f"{shape.linear:,} / 64 x 1 byte + {shape.linear:,} / (64 x 256) x 4 bytes",
        "double quantization: 0.127 bits a weight (QLoRA, section 3)",
    )


def _trained(shape: Shape, setting: Setting, profile: Profile) -> Iterator[Part]:
    """Adapter, gradients and optimizer.

    PEFT holds an adapter in float32, TRL turns it into bfloat16 on 4-bit weights. In full fine-tuning DeepSpeed keeps a
    float32 copy of the weights for the optimizer; without DeepSpeed everything is bfloat16.
    """
    zero = setting.zero_stage
    for_gradients, for_states = (setting.gpus if zero >= stage else 1 for stage in (2, 1))
    if profile.lora is None:
        count, width, states = shape.parameters, COMPUTE_BYTES, 12 if zero else 4
        source = "AdamW's mean and variance; DeepSpeed adds a float32 copy: 12 bytes (arXiv 1910.02054, section 3.1)"
    else:
        count, width = lora_parameters(shape, profile), COMPUTE_BYTES if setting.quantization else 4
        states, source = 2 * width, "AdamW's mean and variance, in the adapter's dtype"
        yield Part(
            "adapter",
            count * width,
            f"{count:,} parameters x {width} bytes",
            "LoRA: r x (inputs + outputs) for each target in each layer (arXiv 2106.09685)",
        )
    yield Part(
        "gradients",
        count * width // for_gradients,
        f"{count:,} x {width} bytes{_divided(for_gradients)}",
        "one for each trained parameter, in its dtype; ZeRO-2 divides them",
    )
    yield Part("optimizer", count * states // for_states, f"{count:,} x {states} bytes{_divided(for_states)}", source)


def lora_parameters(shape: Shape, profile: Profile) -> int:
    """Trainable parameters of the profile's adapter: r x (inputs + outputs) for each target in each layer."""
    return shape.layers * profile.lora.r * sum(shape.lora_width(target) for target in profile.lora.target_modules)


def _activations(shape: Shape, setting: Setting, layer: int) -> Part:
    tokens, ends = setting.tokens, setting.tokens * shape.hidden * 8
    if setting.gradient_checkpointing:
        return Part(
            "activations",
            tokens * shape.layers * shape.hidden * setting.width + ends,
            f"{tokens:,} tokens x ({shape.layers} layers x {shape.hidden:,} x {setting.width} bytes "
            f"+ {shape.hidden:,} x 8)",
            "checkpointing keeps the input of each layer (arXiv 1604.06174); the last norm keeps float32",
        )
    return Part(
        "activations",
        tokens * shape.layers * layer + ends,
        f"{tokens:,} tokens x ({shape.layers} layers x {layer:,} bytes + {shape.hidden:,} x 8)",
        "what autograd keeps of a layer, see layer_bytes (arXiv 2205.05198 for another architecture)",
    )


def layer_bytes(shape: Shape, profile: Profile, setting: Setting) -> int:
    """Bytes a token that autograd keeps of one layer with sdpa attention on a GPU.

    Counted in bfloat16 with torch's saved-tensor hooks on transformers 5.23 and PEFT 0.21, which a test repeats; in
    float32 all but the norms is taken as twice that. The norms in float32; q, k, v and the attention's output; its
    logarithm of sums; gate and up, and the activated gate. A mask costs its copy in the dtype, and k and v repeated for
    every head of q (use_gqa_in_sdpa in transformers). LoRA keeps for each target its input, the r values between its
    matrices and dropout's mask of a byte (native_dropout, which CUDA takes); full fine-tuning the input of every linear
    module and of the norms' weights.
    """
    norms = shape.norms * (4 * shape.hidden + 4)
    keys = 2 * (shape.query if setting.masked else shape.key)
    width = setting.width
    attention = width * (2 * shape.query + keys + (setting.sequence if setting.masked else 0)) + 4 * shape.heads
    mlp = 3 * width * shape.intermediate
    if profile.lora is None:
        inputs = width * ((2 + shape.norms) * shape.hidden + shape.query + shape.intermediate)
        return norms + attention + mlp + inputs
    dropped = 1 if profile.lora.dropout else 0
    each = ((width + dropped) * inputs_of(shape, name) + width * profile.lora.r for name in profile.lora.target_modules)
    return norms + attention + mlp + sum(each)


def inputs_of(shape: Shape, target: str) -> int:
    """Inputs of one linear module."""
    return {"o_proj": shape.query, "down_proj": shape.intermediate}.get(target, shape.hidden)


def _logits(shape: Shape, setting: Setting, profile: Profile) -> Part:
    """TRL holds one tile of logits at a time. Triton's kernels work on it in place; without them torch makes copies."""
    tokens = setting.tokens
    rows, columns = min(tokens, LOGIT_ROWS), min(shape.vocabulary, LOGIT_COLUMNS)
    trained, of_trained = _head_gradient(shape, setting, profile)
    hidden = tokens * shape.hidden * 4 + trained
    if setting.triton and setting.device == "gpu":
        return Part(
            "logits",
            rows * columns * setting.width + hidden,
            f"{rows:,} rows x {columns:,} columns x {setting.width} bytes "
            f"+ {tokens:,} x {shape.hidden:,} x 4{of_trained}",
            "a tile of logits and the float32 gradient of the hidden states (TRL 1.16)",
        )
    tile, weights = rows * columns * (COMPUTE_BYTES + 7 * 4 + 1), columns * shape.hidden * 4 + rows * columns * 6
    return Part(
        "logits",
        max(tile, weights) + hidden,
        f"the larger of {rows:,} x {columns:,} x 31 bytes and {columns:,} x ({shape.hidden:,} x 4 + {rows:,} x 6), "
        f"+ {tokens:,} x {shape.hidden:,} x 4{of_trained}",
        "without Triton TRL 1.16 copies a tile seven times in float32 beside a mask, later tile and lm_head's rows "
        "once (_backward_tile and _addmm_fp32 in trl/kernels/chunked_logprob.py)",
    )


def _head_gradient(shape: Shape, setting: Setting, profile: Profile) -> tuple[int, str]:
    """Where lm_head is trained: its gradient in float32 and bfloat16, beyond the other gradients, which come later."""
    if profile.lora is not None:
        return 0, ""
    own = shape.vocabulary * shape.hidden * (4 + COMPUTE_BYTES)
    later = shape.parameters * COMPUTE_BYTES // (setting.gpus if setting.zero_stage >= 2 else 1)
    return (
        (own - later, f" + {own:,} of lm_head's gradient - {later:,} of gradients that come later")
        if own > later
        else (0, "")
    )


def _working(shape: Shape, setting: Setting, layer: int, logits: int) -> Part:
    """What one layer needs while it is worked on: recomputed activations, and weights back in bfloat16.

    The logits are gone by then, so only what goes beyond them counts.
    """
    tokens = setting.tokens
    again = layer if setting.gradient_checkpointing else 0
    passing = setting.width * (3 * shape.intermediate + 2 * shape.hidden)
    largest = 2 * shape.hidden * shape.intermediate * COMPUTE_BYTES if setting.quantization else 0
    gathered = min(LIVE_PARAMETERS, shape.parameters) * COMPUTE_BYTES if setting.zero_stage == 3 else 0
    return Part(
        "a layer beyond logits",
        max(0, tokens * (again + passing) + largest + gathered - logits),
        f"{tokens:,} tokens x ({again:,} recomputed + {passing:,} gradients)"
        + (f" + {largest:,} bytes dequantized" if largest else "")
        + (f" + {gathered:,} bytes gathered" if gathered else "")
        + f" - {logits:,} of the logits",
        "checkpointing computes a layer's activations again; 4-bit weights are multiplied in bfloat16; ZeRO-3 gathers "
        "up to stage3_max_live_parameters",
    )


def _step(shape: Shape, setting: Setting, profile: Profile, backward: int) -> Iterator[Part]:
    """DeepSpeed's optimizer step, beyond what the backward pass took, which is over by then."""
    if setting.zero_stage:
        count = lora_parameters(shape, profile) if profile.lora else shape.parameters
        group = min(count // setting.gpus, SUB_GROUP if setting.zero_stage == 3 else count)
        yield Part(
            "a step beyond backward",
            max(0, group * (COMPUTE_BYTES + 4) - backward),
            f"{group:,} x (2 + 4) bytes - {backward:,} of the backward pass",
            "DeepSpeed 0.19 copies gradients into one bfloat16 array and that to float32: all of a GPU's at once, with "
            "ZeRO-3 a sub-group's (runtime/zero/stage_1_and_2.py: step; stage3.py: _prepare_fp32_grad_for_sub_group)",
        )


def _constant(setting: Setting) -> Iterator[Part]:
    if setting.zero_stage:
        width = 4 if setting.zero_stage == 1 else COMPUTE_BYTES
        yield Part(
            "communication bucket",
            BUCKET_ELEMENTS * width,
            f"{BUCKET_ELEMENTS:,} x {width} bytes",
            "a buffer of reduce_bucket_size, allocated whole, in float32 for ZeRO-1 (DeepSpeed 0.19, runtime/zero/)",
        )
    if setting.device == "gpu":
        yield Part("libraries", LIBRARY_BYTES, "0.8 GiB", "CUDA context and kernels: assumed, not measured here")
    else:
        yield Part("libraries", CPU_LIBRARY_BYTES, "0.092 GiB", "measured with a model of nearly no size")


def _divided(shards: int) -> str:
    return f" / {shards} GPUs" if shards > 1 else ""


# Searching


def _cheaper(setting: Setting, profile: Profile) -> Iterator[Setting]:
    candidates = [setting]
    while candidates[-1].batch_size > 1:
        candidates.append(dataclasses.replace(candidates[-1], batch_size=candidates[-1].batch_size // 2))
    if not setting.gradient_checkpointing:
        candidates += [dataclasses.replace(each, gradient_checkpointing=True) for each in candidates]
    smallest = candidates[-1]
    while smallest.length > 128:
        smallest = dataclasses.replace(smallest, length=max(128, smallest.length // 2))
        candidates.append(smallest)
    if profile.lora and not setting.quantization and setting.zero_stage < 3:
        candidates += [dataclasses.replace(each, quantization="nf4") for each in candidates]
    yield from candidates
