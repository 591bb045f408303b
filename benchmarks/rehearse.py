"""The whole path of a profile at its true shape with random weights: built, loaded, trained, killed, resumed, answered.

Each stage runs in a process of its own, so that its peak memory is its own. What the model says means nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from benchmarks import cpu_memory
from glm4_helpers.cli.commands import add_json, add_profile, chosen_profile, count, show
from glm4_helpers.cli.main import Parser
from glm4_helpers.cli.main import main as run_command
from glm4_helpers.machine import memory
from glm4_helpers.machine.hardware import this_machine
from glm4_helpers.profiles import Profile, get_profile, profile_settings
from glm4_helpers.support.errors import CourseError, SettingError
from glm4_helpers.support.files import GIB, require_disk
from glm4_helpers.support.paths import outputs_dir

EXAMPLES = """\
examples, from the clone:
  python -m benchmarks.rehearse --profile glm-4-9b-lora --layers 2    minutes, 5 GiB of memory and disk
  python -m benchmarks.rehearse --profile glm-4-9b-lora    all layers: 22 GiB of memory, 20 of disk
  python -m benchmarks.rehearse --profile glm-4-9b-qlora --keep --folder /data/rehearsal

Builds the model with random weights, loads it, trains, kills the training, resumes it, loads the
adapter and answers. Nothing is downloaded, and the answers mean nothing. Without a GPU, the RAM
that each stage takes stands beside an estimate for a CPU; with one, the GPU memory beside the
estimate of `memory`. Empty CUDA_VISIBLE_DEVICES= in front keeps it off a GPU. Linux and macOS
only; glm-4-9b-qlora needs bitsandbytes."""
ROOT = Path(__file__).resolve().parent.parent
SHARD_BYTES = 2 * GIB
POOL = 16_777_213
"""Random numbers that weights are filled from, a prime so that no two rows of a matrix start alike."""

SHORTEST_ROW = 12
"""Tokens: 7 of the chat format, 4 of a question, 1 of an answer."""

ROWS, CHECKPOINT_AT, KILLED_IN, NEW_TOKENS = 3, 2, 3, 4
STAGES = ("load", "train", "resume", "reload")
RETURN_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Has glibc give back blocks of 1 MiB and more as soon as they are freed. It would keep those below 32 MiB, by chance
more or less of them, and a peak could not be compared with arithmetic. Other C libraries ignore the variable."""


@dataclass(frozen=True)
class Stage:
    """One stage: seconds, peak memory in GiB, the estimate where there is one, and findings.

    The peak is RAM above what the imports take; on a GPU, what torch reserved there and the CUDA context.
    """

    name: str
    seconds: float
    peak_gib: float
    estimate_gib: float | None
    found: dict[str, Any]


def rehearse(
    profile: Profile,
    folder: Path,
    layers: int | None = None,
    tokens: int = 256,
    report: Callable[[Stage], None] = lambda stage: None,
    batch_size: int = 1,
    stages: tuple[str, ...] = STAGES,
) -> list[Stage]:
    """Walk the whole path in `folder`, which must be empty or absent and is left behind for a look.

    `layers` None means all. `stages` are those that follow the building, in their order. Each stage is handed to
    `report` when it is done. Before anything is written, SettingError is raised for a folder that is not empty and for
    rows too short for an answer, MachineError for too little memory or disk; later CourseError for the first stage that
    goes wrong.
    """
    if tokens < SHORTEST_ROW:
        raise SettingError(
            f"Rows of {tokens} tokens have no room for an answer.", f"Give --tokens {SHORTEST_ROW} or more."
        )
    config = model_config(profile, layers)
    folder = Path(folder).resolve()
    _check_folder(folder)
    gpu = on_gpu()
    setting = memory.setting_of(profile, batch_size=batch_size, length=tokens, device="gpu" if gpu else "cpu")
    wanted = memory.require_memory(profile, _available_gib(gpu), setting, config)
    if not gpu:
        wanted = cpu_memory.estimate(profile, setting, config)
    check_disk(folder, profile, config)
    done = []
    for name, act in (
        ("build", lambda: build(profile, folder, config, tokens, ROWS * batch_size)),
        *((name, lambda name=name: _in_process(name, profile, folder, tokens, batch_size)) for name in stages),
    ):
        started = time.monotonic()
        found = act()
        peak = found.pop("peak_gib")
        guess = wanted.total_gib if name in ("train", "resume") else None
        done.append(Stage(name, round(time.monotonic() - started, 1), round(peak, 2), guess, found))
        report(done[-1])
    return done


def model_config(profile: Profile, layers: int | None = None) -> Any:
    """The config of the profile's model with so many layers. Raises SettingError for more than it has, or none."""
    from glm4_helpers.checks.shapes import model_config as whole

    config = whole(profile)
    if layers is None:
        return config
    if not 1 <= layers <= config.num_hidden_layers:
        raise SettingError(f"{profile.name} has no {layers} layers.", f"Give --layers 1 to {config.num_hidden_layers}.")
    config.num_hidden_layers = layers
    return config


# Building


def build(
    profile: Profile, folder: Path, config: Any, tokens: int, rows: int = ROWS, dev_rows: int = 1
) -> dict[str, Any]:
    """Write model, tokenizer and rows into a course folder; the same bytes each time."""
    base = folder / profile.base_model
    base.mkdir(parents=True)
    (folder / "data").mkdir()
    for name, size in (("train", rows), ("dev", dev_rows)):
        made = [_row(number, tokens) for number in range(size)]
        (folder / "data" / f"{name}.json").write_text(json.dumps(made), encoding="utf-8")
    tokenizer = stand_in_tokenizer(config)
    tokenizer.save_pretrained(base)
    files = _write_weights(profile, config, base)
    return {"shards": files, "peak_gib": _peak_bytes() / GIB}


def _row(number: int, tokens: int) -> dict[str, str]:
    """A row of exactly `tokens` tokens of the stand-in tokenizer: one a byte, and seven of the format."""
    question = f"{number:03}?"
    return {"instruction": question, "input": "", "output": "a" * (tokens - 7 - len(question))}


def stand_in_tokenizer(config: Any):
    """A tokenizer with GLM-4's special tokens at their true ids and one token a byte; there are no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from nano.tokenizer import glm4_tokenizer

    first = config.eos_token_id[0] if isinstance(config.eos_token_id, list) else config.eos_token_id
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(letters)}
    vocabulary |= {f"unused-{number}": number for number in range(len(letters), first)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return glm4_tokenizer(tokenizer)


def _write_weights(profile: Profile, config: Any, base: Path) -> int:
    """Seeded random bfloat16 weights in shards of SHARD_BYTES with an index. Returns the number of shards."""
    from safetensors.torch import save_file

    from glm4_helpers.checks.shapes import meta_model

    model = meta_model(config)
    shards = list(_shards(model.state_dict()))
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(dict(_filled(names)), base / file, metadata={"format": "pt"})
        index |= {name: file for name, _ in names}
    total = sum(weight.numel() * 2 for weight in model.state_dict().values())
    content = {"metadata": {"total_size": total}, "weight_map": index}
    (base / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")
    config.architectures, config.dtype = [profile.architecture], "bfloat16"
    config.save_pretrained(base)
    return len(shards)


def _shards(weights: dict[str, Any]) -> Iterator[list[tuple[str, Any]]]:
    shard, size = [], 0
    for name, weight in weights.items():
        if shard and size + weight.numel() * 2 > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, weight.shape))
        size += weight.numel() * 2
    yield shard


def _filled(names: list[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Norms are ones, all else is small random numbers: a run through POOL that starts elsewhere for each weight."""
    import zlib

    import torch

    pool = torch.empty(POOL).normal_(std=0.02, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    for name, shape in names:
        weight = torch.ones(shape, dtype=torch.bfloat16)
        flat, place = weight.view(-1), zlib.crc32(name.encode()) % POOL
        done = len(flat) if "norm" in name else 0
        while done < len(flat):
            part = pool[place : place + len(flat) - done]
            flat[done : done + len(part)] = part
            done, place = done + len(part), 0
        yield name, weight


# Stages, each in a process of its own


def _in_process(stage: str, profile: Profile, folder: Path, tokens: int, batch_size: int) -> dict[str, Any]:
    """Run a stage and return what it found. The stage "train" has to end by its own SIGKILL."""
    result = folder / f"{stage}.json"
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    job = {
        "stage": stage,
        "profile": profile_settings(profile),
        "tokens": tokens,
        "batch_size": batch_size,
        "result": str(result),
    }
    changed = {
        **RETURN_FREED_MEMORY,
        "GLM4_HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(paths),
        "CUDA_VISIBLE_DEVICES": one_gpu(),
    }
    finished = subprocess.run(
        [sys.executable, "-c", f"from benchmarks.rehearse import work; work({job!r})"],
        env={**os.environ, **changed},
        capture_output=True,
        text=True,
    )
    wanted = -signal.SIGKILL if stage == "train" else 0
    if finished.returncode != wanted or not result.exists():
        tail = "\n".join((finished.stdout + finished.stderr).strip().splitlines()[-15:])
        raise CourseError(f"The stage {stage!r} ended with status {finished.returncode}:\n{tail}", f"Look in {folder}.")
    return json.loads(result.read_text(encoding="utf-8"))


def work(job: dict[str, Any]) -> None:
    """One stage in this process; writes what it found and its peak memory as JSON. Called by `rehearse`."""
    # What is imported belongs to the baseline, also what training would import only later.
    from trl import SFTTrainer  # noqa: F401

    settings = dict(job["profile"])
    profile = _rehearsed(get_profile(settings.pop("name"), **settings), job["tokens"], job["batch_size"])
    baseline = _reset_peak()
    keep = _Keeper(Path(job["result"]), baseline)
    keep({"load": _load, "train": _train, "resume": _resume, "reload": _reload}[job["stage"]](profile, keep))


class _Keeper:
    """Writes findings with the peak memory so far; also right before a stage kills itself."""

    def __init__(self, file: Path, baseline: int) -> None:
        self.file, self.baseline = file, baseline

    def __call__(self, found: dict[str, Any]) -> None:
        peak = (_peak_bytes() - self.baseline) / GIB
        if on_gpu():
            found, peak = {**found, **gpu_peak()}, used_gib()
        self.file.write_text(json.dumps({**found, "peak_gib": peak}), encoding="utf-8")


def _rehearsed(profile: Profile, tokens: int, batch_size: int) -> Profile:
    """The profile with a handful of rows and one short answer; model, LoRA and precision stay as they are.

    One question, since torch on a CPU copies lm_head for each one that is answered at the same time: generate takes the
    last position only, and torch.matmul does not fold such a slice (should_fold in ATen's LinearAlgebra.cpp).
    """
    few = dataclasses.replace(
        profile.training,
        epochs=1,
        per_device_batch_size=batch_size,
        evaluation_batch_size=1,
        gradient_accumulation_steps=1,
        max_length=tokens,
        evaluations_per_run=-(-ROWS // CHECKPOINT_AT),
    )
    return dataclasses.replace(
        profile,
        training=few,
        train_data="data/train.json",
        dev_data="data/dev.json",
        test_data=None,
        sample_prompts=(),
        max_new_tokens=NEW_TOKENS,
    )


def _load(profile: Profile, keep: _Keeper) -> dict[str, Any]:
    from glm4_helpers import models

    model = models.load_base_model(profile)
    shape = memory.shape_of(model.config)
    counted = sum(_numbers(weight) for weight in model.parameters())
    _require(counted == shape.parameters, f"{counted:,} parameters were loaded, {shape.parameters:,} are in the shape")
    _require(len(model.model.layers) == model.config.num_hidden_layers, "the layers are not all there")
    _require(type(model).__name__ == profile.architecture, f"a {type(model).__name__} was loaded")
    return {"parameters": counted, "layers": shape.layers, "vocabulary": shape.vocabulary}


def _numbers(weight: Any) -> int:
    """Numbers in a parameter; 4-bit ones are stored two a byte."""
    return weight.numel() * 2 if type(weight).__name__ == "Params4bit" else weight.numel()


class _MeasureTraining(TrainerCallback):
    """Forgets the peak of loading, which has a stage of its own: weights that are quantized are read through pages of
    their files, and those stay resident until all are read, unless the system needs them. Times each step."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seconds = tokens, []

    def on_train_begin(self, args, state, control, **kwargs):
        _reset_peak()

    def on_step_begin(self, args, state, control, **kwargs):
        synchronize()
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize()
        self.seconds.append(time.perf_counter() - self.started)

    def found(self) -> dict[str, Any]:
        """Seconds and real tokens a second of the last whole step; the first one has to warm up."""
        return {"s_a_step": round(self.seconds[-1], 3), "tokens_a_second": round(self.tokens / self.seconds[-1])}


def _train(profile: Profile, keep: _Keeper) -> dict[str, Any]:
    from glm4_helpers import training

    class Kill(_MeasureTraining):
        """Ends the process as a machine that goes down would: in the middle of a step, with its gradients there."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == KILLED_IN:
                keep({"killed_in_step": KILLED_IN, **self.found()})
                os.kill(os.getpid(), signal.SIGKILL)

    training.train(profile, tracking_mode="disabled", callbacks=[Kill(_step_tokens(profile))])
    return {}


def _step_tokens(profile: Profile) -> int:
    return profile.training.per_device_batch_size * profile.training.max_length


def _resume(profile: Profile, keep: _Keeper) -> dict[str, Any]:
    from glm4_helpers import training

    result = training.train(profile, tracking_mode="disabled", callbacks=[_MeasureTraining(_step_tokens(profile))])
    _require(result.resumed_from == CHECKPOINT_AT, f"training went on from step {result.resumed_from}")
    steps = max(row["step"] for row in result.log_history)
    _require(steps == ROWS, f"training ended after step {steps}")
    return {"resumed_from": result.resumed_from, "steps": steps, "final_loss": round(result.final_loss, 4)}


def _reload(profile: Profile, keep: _Keeper) -> dict[str, Any]:
    from glm4_helpers import generation, models, training

    trained = training.default_adapter_dir(profile)
    if profile.lora is None:
        profile = dataclasses.replace(profile, base_model=str(trained))
    tokenizer = models.load_tokenizer(profile)
    found: dict[str, Any] = {}
    model = models.load_base_model(profile)
    if profile.lora is not None:
        model = models.load_adapter(model, trained, profile)
        found["adapter_modules"] = model.config.num_hidden_layers * len(profile.lora.target_modules)
        found["adapter_effect"] = adapter_effect(model, tokenizer)
        _require(found["adapter_effect"] > 0, "the adapter changes nothing")
    pieces = list(generation.stream(model, tokenizer, [{"role": "user", "content": "a?"}], max_new_tokens=NEW_TOKENS))
    return {**found, "streamed": bool(pieces) or "the first token was a stop id"}


def adapter_effect(model: Any, tokenizer: Any) -> float:
    """The largest difference that the adapter makes to the logits of one token."""
    import torch

    from glm4_helpers import models

    ids = torch.tensor([tokenizer("a?")["input_ids"]], device=model.device)
    with torch.no_grad():
        live = model(ids).logits[0, -1].float()
        with models.adapter_off(model):
            off = model(ids).logits[0, -1].float()
    return round(float((live - off).abs().max()), 6)


def _require(true: bool, otherwise: str) -> None:
    if not true:
        raise CourseError(f"The rehearsal found that {otherwise}.", "Look at the model's shape and the adapter.")


# Memory and disk


def _reset_peak() -> int:
    """Start measuring: the resident bytes now. The kernel's peak is set back where it allows that (Linux)."""
    import gc

    import psutil

    gc.collect()
    if on_gpu():
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass
    return psutil.Process().memory_info().rss


def _peak_bytes() -> int:
    """The largest resident memory so far, memory-mapped weights counted."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def on_gpu() -> bool:
    """Whether the models are on a GPU in this process."""
    from glm4_helpers.machine.gpus import default_device

    return default_device().type == "cuda"


def one_gpu() -> str:
    """CUDA_VISIBLE_DEVICES for a process that trains: the first GPU that is visible, since TRL's trainer takes one."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]


def synchronize() -> None:
    """Wait until the GPU has done what it was given, or the clock would show less."""
    import torch

    if on_gpu():
        torch.cuda.synchronize()


def gpu_peak() -> dict[str, float]:
    """GiB that torch allocated at most, and those it reserved for that."""
    import torch

    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return {"allocated_gib": round(allocated / GIB, 2), "reserved_gib": round(reserved / GIB, 2)}


def used_gib() -> float:
    """GiB of the GPU that were taken at most: what torch reserved, and what else is not free, such as CUDA's context.

    What other processes have there counts too, so none should.
    """
    import torch

    free, total = torch.cuda.mem_get_info()
    return (total - free - torch.cuda.memory_reserved() + torch.cuda.max_memory_reserved()) / GIB


def _available_gib(gpu: bool = False) -> float:
    """Free RAM, or free memory of the GPU. A process that ends asks: a CUDA context here would take some."""
    if not gpu:
        return this_machine().memory_available_gib
    asked = "import torch; print(torch.cuda.mem_get_info()[0])"
    return int(subprocess.check_output([sys.executable, "-c", asked], text=True)) / GIB


def _check_folder(folder: Path) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise SettingError(f"{folder} is not empty; nothing was overwritten.", "Give another folder, or empty it.")


def check_disk(folder: Path, profile: Profile, config: Any) -> None:
    """The base model; without LoRA also two checkpoints with AdamW's two states, and the trained model."""
    copies = 1 if profile.lora else 1 + 2 * 3 + 1
    needed = memory.shape_of(config).parameters * 2 * 1.05 * copies + GIB
    require_disk(folder, needed, "The rehearsal", "Free some space, or rehearse fewer layers (--layers 2).")


def format_stages(stages: list[Stage]) -> str:
    """The stages as a Markdown table."""
    lines = ["| stage | seconds | peak GiB | estimated GiB | found |", "|---|---:|---:|---:|---|"]
    for stage in stages:
        guess = f"{stage.estimate_gib:.2f}" if stage.estimate_gib else ""
        found = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in stage.found.items())
        lines.append(f"| {stage.name} | {stage.seconds:.1f} | {stage.peak_gib:.2f} | {guess} | {found} |")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def build_parser() -> argparse.ArgumentParser:
    """The parser of `python -m benchmarks.rehearse`."""
    parser = Parser(
        prog="python -m benchmarks.rehearse",
        description="Try a profile's whole path at its true shape with random weights, before a GPU is rented.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_profile(parser)
    parser.add_argument("--layers", type=count, metavar="N", help="the first N layers only (default: all)")
    parser.add_argument("--tokens", type=count, default=256, metavar="N", help="tokens of each row (default: 256)")
    parser.add_argument(
        "--folder", type=Path, metavar="FOLDER", help="where to build, empty or absent (default: outputs/rehearsal)"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder when done (it is large)")
    add_json(parser)
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Rehearse, print the stages, and leave nothing behind unless asked to."""
    profile = chosen_profile(arguments)
    folder = arguments.folder or outputs_dir() / "rehearsal"
    foreign = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))

    def report(stage: Stage) -> None:
        print(f"{stage.name}: {stage.seconds:.0f} s, peak {stage.peak_gib:.2f} GiB", file=sys.stderr, flush=True)

    try:
        stages = rehearse(profile, folder, arguments.layers, arguments.tokens, report)
    finally:
        if not arguments.keep and not foreign:
            shutil.rmtree(folder, ignore_errors=True)
    figures = {"profile": profile.name, "machine": str(this_machine()), "stages": [asdict(stage) for stage in stages]}
    show(arguments, figures, f"{this_machine()}\n\n{format_stages(stages)}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run a rehearsal and return its exit status, as `glm4_helpers.cli.main.main` does."""
    return run_command(argv, build_parser())


if __name__ == "__main__":
    sys.exit(main())
