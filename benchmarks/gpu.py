"""GLM-4-9B at its true shape with random weights on this machine's GPU: memory, speed, answers, caps of smaller cards.

    python -m benchmarks.gpu --out outputs/gpu --until 700    at most 12 minutes on an H100; 20 GB of disk while it runs
    python -m benchmarks.gpu --out outputs/try --dry-run      every section with a tiny shape, on a CPU too

Needs no network. Each section runs in its own process. Each result is written to OUT/results.jsonl as it comes, and
a failure with its reason. At the end OUT/gpu.md is the table; a real run also writes benchmarks/gpu.md.
`--sections` repeats some of them; the results of the others stay.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import TrainerCallback

from benchmarks import rehearse
from glm4_helpers import generation, models, training
from glm4_helpers.machine import memory
from glm4_helpers.profiles import get_profile
from glm4_helpers.support import files

ROOT = Path(__file__).resolve().parent.parent
RECIPE_ROWS = 3 * 40_543
"""Rows of the published recipe: three epochs of Alpaca-GPT4 in Chinese without the held-out ones."""

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16}
FREE, CHECKPOINTING = "training.padding_free", "training.gradient_checkpointing"
LORA = (  # case, rows, tokens a row (None: as in real data), timed steps, settings
    ("the recipe's 2 rows, padded", 2, None, 60, {FREE: False}),
    ("the recipe's 2 rows, joined", 2, None, 60, {}),
    ("16 rows, joined", 16, None, 16, {}),
    ("16 rows, joined, no checkpointing", 16, None, 16, {CHECKPOINTING: False}),
    ("2 x 512", 2, 512, 16, {}),
    ("2 x 512, padded", 2, 512, 16, {FREE: False}),
    ("2 x 512, no checkpointing", 2, 512, 16, {CHECKPOINTING: False}),
    ("1 x 256", 1, 256, 16, {}),
    ("1 x 1,024", 1, 1024, 16, {}),
    ("8 x 512", 8, 512, 8, {}),
    ("8 x 512, no checkpointing", 8, 512, 8, {CHECKPOINTING: False}),
    ("4 x 2,048", 4, 2048, 5, {}),
)
QLORA = tuple(LORA[number] for number in (0, 1, 2, 4, 6, 9))
FULL = (("all weights, 2 x 512", 2, 512, 4, {}), ("all weights, 2 x 512, 8-bit AdamW", 2, 512, 4, {}))
ANSWERS = tuple((tuned, batch) for tuned, batches in ((True, (1, 4, 16, 64)), (False, (1, 64))) for batch in batches)
CARDS = (  # card, GiB left to torch (the card's without 0.6 GiB of CUDA context), profile, rows a step
    ("8 GB", 7.2, "glm-4-9b-qlora", 1),
    ("12 GB", 11.0, "glm-4-9b-qlora", 2),
    ("16 GB", 14.0, "glm-4-9b-qlora", 16),
    ("24 GB (L4)", 21.4, "glm-4-9b-lora", 2),
)


class Bench:
    """One section at work: the model it has loaded, its clock, and its results."""

    def __init__(self, out: Path, section: str, until: float, dry: bool) -> None:
        self.out, self.section, self.until, self.dry = out, section, time.monotonic() + until, dry
        self.gpu, self.model, self.tokenizer = torch.cuda.is_available(), None, None

    def case(self, name: str, act: Callable[[], dict[str, Any]]) -> None:
        """Write what `act` finds, or why it failed."""
        if time.monotonic() > self.until:
            return write(self.out, self.section, name, failed="no time was left")
        try:
            found = act()
        except Exception as error:
            self.model = None  # an adapter may be left on it
            found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"}
        self.clean()
        write(self.out, self.section, name, **found)

    def clean(self) -> None:
        """Give back what nothing refers to; TRL's trainers are in cycles."""
        gc.collect()
        if self.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def memory(self) -> dict[str, float]:
        """GiB of the GPU at the peak since `clean`."""
        return {**rehearse.gpu_peak(), "used_gib": round(rehearse.used_gib(), 2)} if self.gpu else {}

    def load(self, profile) -> dict[str, Any]:
        """Load the profile's base model, by the package's own loader."""
        self.model = None
        self.clean()
        started = time.perf_counter()
        self.model, self.tokenizer = models.load_base_model(profile), models.load_tokenizer(profile)
        rehearse.synchronize()
        return {"seconds": round(time.perf_counter() - started, 1), **self.memory()}

    def train(self, profile, batch: int, length: int | None, steps: int, optim: str | None = None) -> dict[str, Any]:
        """Steps of the course's own trainer; seconds, tokens and arithmetic a step, peak memory and its estimate."""
        if self.model is None:
            self.load(profile)
        warm = 1 if self.dry else 4
        sizes = row_lengths(length, batch * (steps + warm))
        draw = random.Random(1)
        ids = [[draw.randrange(256) for _ in range(size)] for size in sizes]
        rows = Dataset.from_dict(
            {"input_ids": ids, "labels": [[-100] * (len(row) // 5) + row[len(row) // 5 :] for row in ids]}
        )
        config = training.sft_config(profile, self.out / "runs", self.model.dtype)
        config.optim = optim or config.optim
        clock = Clock(warm)
        self.clean()
        trainer = training.build_trainer(
            self.model, self.tokenizer, rows, None, profile, self.out / "runs", [clock], config
        )
        trainer.train()
        shape, seconds, tokens = memory.shape_of(self.model.config), clock.seconds / steps, sum(sizes) / (steps + warm)
        # Two for a multiplication and an addition, forward and backward; a frozen weight has no gradient. What
        # checkpointing repeats is not counted. lm_head scores the answers, four fifths of the tokens here.
        flops = tokens * (4 if profile.lora else 6) * (shape.linear + 0.8 * shape.vocabulary * shape.hidden)
        found = self.memory()
        if optim is None:  # `memory` counts the course's own optimizer
            guess = memory.estimate_memory(
                profile, memory.setting_of(profile, length=max(sizes), lengths=tuple(sizes)), shape
            )
            found |= {
                "estimated_gib": round(guess.total_gib, 2),
                "libraries_gib": round(memory.LIBRARY_BYTES / files.GIB, 2),
            }
        trainer.model = trainer.model_wrapped = bare(trainer.model)
        if profile.lora is None:
            self.model = None
        return {
            "s_a_step": round(seconds, 4),
            "rows_a_second": round(batch / seconds, 2),
            "tokens_a_second": round(tokens / seconds),
            "tflops": round(flops / seconds / 1e12, 1),
            **found,
        }

    def answers(self, profile, batch: int, tuned: bool) -> dict[str, Any]:
        """Greedy answers with an adapter, unmerged as the course runs it, or without."""
        if self.model is None:
            self.load(profile)
        model = get_peft_model(self.model, training.lora_config(profile)) if tuned else self.model
        new = 2 if self.dry else 128
        asked = [[{"role": "user", "content": f"{number:03}" + "a" * 40}] for number in range(batch)]
        generation.answers(model, self.tokenizer, asked, 2, batch_size=batch)
        started = time.perf_counter()
        given = generation.answers(model, self.tokenizer, asked, new, batch_size=batch)
        seconds, counts = time.perf_counter() - started, [answer.token_count for answer in given]
        self.model = bare(model)
        return {
            "seconds": round(seconds, 2),
            "answers_a_second": round(batch / seconds, 2),
            "ms_a_step": round(1000 * seconds / max(1, *counts), 1),
            "tokens_a_second": round(sum(counts) / seconds, 1),
            **self.memory(),
        }


def row_lengths(length: int | None, count: int) -> list[int]:
    """Tokens of rows: as in 400 rows of Alpaca-GPT4 in Chinese (log-normal, mean about 150), or every other one a token
    shorter than `length`, since attention over rows of one length would need no mask."""
    draw = random.Random(0)
    if length is None:
        return [max(20, min(512, int(draw.lognormvariate(4.83, 0.62)))) for _ in range(count)]
    return [length - number % 2 for number in range(count)]


class Clock(TrainerCallback):
    """Times all steps after the first `warm` ones."""

    def __init__(self, warm: int) -> None:
        self.warm = warm

    def on_step_end(self, args, state, control, **kwargs):
        rehearse.synchronize()
        if state.global_step == self.warm:
            self.started = time.perf_counter()
        elif state.global_step > self.warm:
            self.seconds = time.perf_counter() - self.started


def bare(trained):
    """The base model as it was loaded: without adapter, TRL's head and checkpointing."""
    model = trained.unload() if hasattr(trained, "unload") else trained
    model.__dict__.pop("forward", None)
    model.gradient_checkpointing_disable()
    return model.eval()


# Sections


def build(bench: Bench) -> None:
    """The model's files and rows, in a folder that is there when all of it is."""
    profile = get_profile("glm-4-9b-lora")
    config, folder = rehearse.model_config(profile), bench.out / "course.part"
    for name, value in TINY.items() if bench.dry else ():
        setattr(config, name, value)

    def act() -> dict[str, Any]:
        started = time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)
        rehearse.check_disk(folder, profile, config)
        tokens = 32 if bench.dry else 512
        rehearse.build(profile, folder, config, tokens, 48, dev_rows=16)
        folder.rename(bench.out / "course")
        return {"seconds": round(time.perf_counter() - started, 1)}

    bench.case("all layers on disk", act)


def machine(bench: Bench) -> None:
    """The card, the versions, and how fast it multiplies the largest matrix of a layer."""

    def card() -> dict[str, Any]:
        names = ("torch", "transformers", "trl", "peft", "accelerate")
        found = {"card": "no GPU", "date": datetime.date.today().isoformat(), **{name: version(name) for name in names}}
        if bench.gpu:
            asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            driver = (
                subprocess.run(asked, capture_output=True, text=True).stdout.split() if shutil.which(asked[0]) else []
            )
            total = torch.cuda.get_device_properties(0).total_memory
            found |= {
                "card": torch.cuda.get_device_name(),
                "driver": (driver or ["unknown"])[0],
                "total_gib": round(total / 2**30, 1),
            }
        return found

    def matmul(tokens: int) -> dict[str, Any]:
        inputs, outputs = (64, 256) if bench.dry else (4096, 27_392)
        device = "cuda" if bench.gpu else "cpu"
        left, right = (torch.randn(rows, inputs, device=device, dtype=torch.bfloat16) for rows in (tokens, outputs))
        for _ in range(5):
            left @ right.T
        rehearse.synchronize()
        started = time.perf_counter()
        for _ in range(30):
            left @ right.T
        rehearse.synchronize()
        return {"tflops": round(2 * tokens * inputs * outputs * 30 / (time.perf_counter() - started) / 1e12, 3)}

    bench.case("machine", card)
    for tokens in (400, 1024, 4096, 8192):
        bench.case(f"matrix product, {tokens:,} tokens", lambda tokens=tokens: matmul(tokens))


def training_cases(bench: Bench, name: str, cases) -> None:
    """Load a profile's model and train each case on it."""
    bench.case(f"load {name}", lambda: bench.load(get_profile(name)))
    for case, batch, length, steps, changes in cases:
        if bench.dry:
            batch, length, steps = min(batch, 2), 24, 2
        fixed = {"training.per_device_batch_size": batch, "training.epochs": 1, "training.evaluations_per_run": 0}
        profile = get_profile(name, **fixed, **{"training.max_length": length or 512, **changes})
        optim = "adamw_8bit" if "8-bit" in case else None
        bench.case(case, lambda: bench.train(profile, batch, length, steps, optim))


def answer_cases(bench: Bench, name: str, cases=ANSWERS) -> None:
    """Answer with a profile's model, so many questions at a time."""
    profile = get_profile(name)
    for tuned, batch in cases:
        batch = min(batch, 2 + batch // 16) if bench.dry else batch  # four different ones
        bench.case(
            f"{'adapter on' if tuned else 'base model'}, {batch} at a time",
            lambda: bench.answers(profile, batch, tuned),
        )


def caps(bench: Bench) -> None:
    """`train` with checkpoints, evaluations and answers while torch may take no more than a smaller card has."""

    def act(gib: float, name: str, batch: int, output: Path) -> dict[str, Any]:
        if bench.gpu:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total))
        profile = get_profile(
            name,
            **{
                "train_data": "data/train.json",
                "dev_data": "data/dev.json",
                "test_data": None,
                "sample_prompts": (),
                "max_new_tokens": 2 if bench.dry else 32,
                "training.per_device_batch_size": batch,
                "training.epochs": 0.1 if bench.dry else 0.5,
                "training.evaluations_per_run": 1 if bench.dry else 2,
            },
        )
        result = training.train(profile, output, resume=False, tracking_mode="disabled")
        return {"cap_gib": gib, "seconds": round(result.seconds, 1), **bench.memory()}

    for card, gib, name, batch in CARDS:
        output = bench.out / "runs" / card.split()[0]
        bench.case(
            f"{card}: {name}, {batch} x 512", lambda: act(gib, name, min(batch, 2) if bench.dry else batch, output)
        )


def qlora(bench: Bench) -> None:
    """The same on weights in 4 bits."""
    training_cases(bench, "glm-4-9b-qlora", QLORA)
    answer_cases(bench, "glm-4-9b-qlora", ((True, 1), (True, 16)))


SECTIONS: dict[str, Callable[[Bench], None]] = {
    "machine": machine,
    "lora": lambda bench: training_cases(bench, "glm-4-9b-lora", LORA),
    "answers": lambda bench: answer_cases(bench, "glm-4-9b-lora"),
    "qlora": qlora,
    "full": lambda bench: training_cases(bench, "glm-4-9b-full", FULL),
    "caps": caps,
}


# Results


def write(out: Path, section: str, case: str, **found: Any) -> None:
    """Add one result to results.jsonl."""
    line = json.dumps({"section": section, "case": case, **found}, ensure_ascii=False)
    with (out / "results.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(line + "\n")
    print(line, flush=True)


COLUMNS = {
    "cap_gib": "GiB allowed",
    "seconds": "s",
    "s_a_step": "s a step",
    "rows_a_second": "rows/s",
    "answers_a_second": "answers/s",
    "ms_a_step": "ms a step",
    "tokens_a_second": "tokens/s",
    "tflops": "TFLOP/s",
    "share": "of matrix peak",
    "hours": "hours for the recipe",
    "allocated_gib": "GiB allocated",
    "reserved_gib": "GiB reserved",
    "used_gib": "GiB of the card",
    "estimated_gib": "GiB estimated",
    "off": "estimate off by",
}


def render(out: Path) -> str:
    """The results as Markdown; of a case that was measured twice, the later one."""
    lines = (out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    results = {(line["section"], line["case"]): line for line in map(json.loads, lines)}
    facts = results.get(("machine", "machine"), {})
    peak = max(
        (line["tflops"] for (section, case), line in results.items() if "matrix" in case and "tflops" in line),
        default=0,
    )
    text = [
        "# GLM-4-9B on a GPU: measured with random weights of the true shape",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items() if name not in ("section", "case")) + ".",
        "",
        "Tokens are real ones, without padding. Of the matrix peak: a step's arithmetic, without what checkpointing",
        "repeats, against the best product below. The estimate is `memory`'s; it is off by its difference, without",
        "libraries, from what was allocated.",
        "Hours: the recipe's three epochs at this speed. Written by `python -m benchmarks.gpu`.",
    ]
    for section in ("build", *SECTIONS):
        rows = [dict(line) for (name, _), line in results.items() if name == section and line is not facts]
        for row in rows:
            if "s_a_step" in row:
                row["hours"] = (
                    round(RECIPE_ROWS / row["rows_a_second"] / 3600, 1)
                    if row["case"] in {case[0] for case in LORA[:4]}
                    else ""
                )
                row["share"] = f"{row['tflops'] / peak:.0%}" if peak else ""
            if "estimated_gib" in row and "allocated_gib" in row:
                row["off"] = f"{(row['estimated_gib'] - row['libraries_gib']) / row['allocated_gib'] - 1:+.1%}"
        shown = [key for key in COLUMNS if any(row.get(key, "") != "" for row in rows)]
        text += [
            "",
            f"## {section}",
            "",
            f"| case | {' | '.join(COLUMNS[key] for key in shown)} |" if shown else "| case |",
        ]
        text += ["|---|" + "---:|" * len(shown)]
        for row in rows:
            reason = f" (failed: {row['failed']})".replace("|", "/") if "failed" in row else ""
            text.append(f"| {row['case']}{reason} |" + "".join(f" {row.get(key, '')} |" for key in shown))
    return "\n".join([*text, ""])


def main(argv: list[str] | None = None) -> int:
    """Run the sections, each in its own process, and render the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where results go")
    parser.add_argument(
        "--until", type=float, default=700, metavar="S", help="start nothing after so many seconds (default: 700)"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="default: all")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and few steps: does everything run?")
    parser.add_argument("--keep", action="store_true", help="keep the model's files (20 GB) for another run")
    parser.add_argument("--section", choices=("build", *SECTIONS), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    out, started = arguments.out.resolve(), time.monotonic()
    if arguments.section:
        bench = Bench(out, arguments.section, arguments.until, arguments.dry_run)
        {"build": build, **SECTIONS}[arguments.section](bench)
        return 0
    out.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "GLM4_HOME": str(out / "course"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "PYTHONWARNINGS": "ignore",
        "CUDA_VISIBLE_DEVICES": rehearse.one_gpu(),
    }

    def left() -> float:
        return arguments.until - (time.monotonic() - started)

    def start(section: str, **variables: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "benchmarks.gpu",
            "--out",
            str(out),
            "--until",
            str(left()),
            "--section",
            section,
        ]
        return subprocess.Popen(
            [*command, *(["--dry-run"] if arguments.dry_run else [])], env={**environment, **variables}
        )

    def finish(section: str, worker: subprocess.Popen) -> None:
        try:
            status = worker.wait(timeout=max(left(), 0) + 15)
        except subprocess.TimeoutExpired:
            worker.kill()
            status = f"signal {worker.wait()}, as no time was left"
        if status:
            write(out, section, "the whole section", failed=f"its process ended with {status}")

    # The model's files are written while the GPU multiplies matrices.
    builder = None if (out / "course").exists() else start("build", GLM4_HOME=str(ROOT), CUDA_VISIBLE_DEVICES="")
    for section in arguments.sections:
        if builder is not None and section != "machine":
            finish("build", builder)
            builder = None
        finish(section, start(section))
    if builder is not None:
        finish("build", builder)
    table = render(out)
    for file in (out / "gpu.md", *([] if arguments.dry_run else [ROOT / "benchmarks" / "gpu.md"])):
        file.write_text(table, encoding="utf-8")
    if not arguments.keep:
        shutil.rmtree(out / "course", ignore_errors=True)
    shutil.rmtree(out / "runs", ignore_errors=True)
    print(f"Table: {out / 'gpu.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
