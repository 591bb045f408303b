"""glm4-nano's speed on this machine: time to accuracy, the step, a busy machine, answers, growth.

    python -m benchmarks.speed                      over an hour on 2 quiet cores; writes benchmarks/speed.md
    python -m benchmarks.speed --sections answers   one section again; the results of the others stay
    python -m benchmarks.speed --out outputs/try --dry-run   every section, short, and nothing into benchmarks/

Each measurement runs in its own process. What is compared takes turns, round by round, and the table has medians and
spreads. Training is measured on the shipped base model and the course's rows; the test sets are not touched.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import GlmConfig, GlmForCausalLM, TrainerCallback

from glm4_helpers import evaluation, generation, held_out, models, training
from glm4_helpers.chat_format import prompt_ids
from glm4_helpers.data import encode_rows, to_messages
from glm4_helpers.machine.hardware import this_machine
from glm4_helpers.profiles import get_profile

HERE = Path(__file__).resolve().parent
SHARE = 0.95
"""Of the best dev accuracy of all systems: when it is first reached counts."""
PADDED = {"training.padding_free": False}
SYSTEMS: dict[str, dict[str, Any]] = {
    "this course": {},
    "plain TRL, the course's settings": PADDED,
    # The line for LoRA in TRL's own script, trl/scripts/sft.py. It leaves the matrices to PEFT, which knows none for
    # GLM, so they are all linear layers.
    "plain TRL, its documented settings": {
        **PADDED,
        "lora.r": 32,
        "lora.alpha": 16,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
        "training.learning_rate": 2e-4,
        "training.per_device_batch_size": 2,
        "training.gradient_accumulation_steps": 8,
    },
    "the tutorial's recipe": {
        **PADDED,
        "lora.r": 8,
        "lora.alpha": 32,
        "lora.dropout": 0.1,
        "lora.target_modules": ["q_proj", "k_proj", "v_proj"],
        "training.learning_rate": 5e-4,
        "training.per_device_batch_size": 2,
    },
}
WAITING: dict[str, dict[str, str]] = {
    "as the course sets them": {},
    "torch's own": {"GOMP_SPINCOUNT": "300000"},  # libgomp's default
    "one thread": {"OMP_NUM_THREADS": "1"},
}
GROWTH: dict[str, tuple[int, ...]] = {
    "length": (32, 64, 128, 256, 512),
    "batch": (2, 4, 8, 16, 32),
    "layers": (2, 4, 8, 16),
    "vocabulary": (5_000, 10_000, 20_000, 40_000, 80_000),
}
SPIN = "while True: pass"


# Measurements: each runs in a process of its own and returns what it found


class Watch(TrainerCallback):
    """Stops the clock now and then, at a quarter more seconds each time, and answers dev rows meanwhile."""

    def __init__(self, tokenizer, rows, facts, limit: float) -> None:
        self.tokenizer, self.rows, self.facts, self.limit = tokenizer, rows, facts, limit
        self.trained, self.next, self.points = 0.0, min(5.0, limit / 4), []

    def on_train_begin(self, args, state, control, **kwargs):
        self.resumed = time.perf_counter()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.trained += time.perf_counter() - self.resumed
        over = self.trained >= self.limit or state.global_step == state.max_steps
        if self.trained >= self.next or over:
            right = evaluation.evaluate_rows(model, self.tokenizer, self.rows).accuracy
            known = evaluation.cloze_accuracy(model, self.tokenizer, self.facts)["all"]["accuracy"]
            self.points.append((round(self.trained, 1), state.global_step, right.value, known))
            self.next = 1.25 * self.trained
        control.should_training_stop = control.should_training_stop or over
        self.resumed = time.perf_counter()


class Clock(TrainerCallback):
    """The seconds of each step."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.times.append(time.perf_counter())

    def a_step(self) -> float:
        """Seconds of a step, the median of all after the fifth."""
        return statistics.median(after - before for before, after in zip(self.times[5:], self.times[6:], strict=False))


def nano(rows: int | None = None, **changes: Any) -> tuple:
    """Profile, tokenizer, base model and encoded training rows."""
    profile = get_profile("glm4-nano", **{"training.evaluations_per_run": 0, **changes})
    tokenizer = models.load_tokenizer(profile)
    conversations, _ = held_out.train_and_dev(profile)
    conversations = conversations.select(range(min(rows or len(conversations), len(conversations))))
    encoded = encode_rows(tokenizer, conversations, profile.training.max_length)
    return profile, tokenizer, models.load_base_model(profile), encoded


def time_to_accuracy(system: str, seed: int, limit: float, dev_rows: int, out: str) -> dict[str, Any]:
    profile, tokenizer, model, rows = nano(None, **SYSTEMS[system], **{"training.seed": seed})
    dev = [row for each in held_out.read_held_out(profile, "dev").values() for row in each]
    watch = Watch(tokenizer, dev[:: max(1, len(dev) // dev_rows)], held_out.read_plain("cloze")[::6], limit)
    training.build_trainer(model, tokenizer, rows, None, profile, out, [watch]).train()
    return {"points": watch.points}


def step(way: str, steps: int, out: str) -> dict[str, Any]:
    """One step of the course, of a bare loop over the same batches, or with TRL's own padding."""
    profile, tokenizer, model, rows = nano(8 * steps, **(PADDED if way == "padded" else {}))
    config = training.sft_config(profile, out, model.dtype)
    config.max_steps, config.torch_compile = steps, way == "torch.compile"
    clock = Clock()
    trainer = training.build_trainer(model, tokenizer, rows, None, profile, out, [clock], config)
    if way != "bare loop":
        trainer.train()
        return {"seconds": clock.a_step(), "loss": trainer.state.log_history[-1]["train_loss"]}
    tuned = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=profile.training.learning_rate)
    for batch in list(trainer.get_train_dataloader())[:steps]:
        trainer.model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.times.append(time.perf_counter())
    return {"seconds": clock.a_step()}


def first_and_tenth(out: str) -> dict[str, Any]:
    """Seconds to a conversation's first piece, and milliseconds a token of its first and tenth answer, by one cache."""
    profile, tokenizer, model, _ = nano(8)
    messages, past, turns, first = [], generation.Past(), [], 0.0
    for turn in range(10):
        messages.append({"role": "user", "content": f"第{turn}个问题：{'苹果香蕉' * 5}的英文是什么？"})
        started, pieces = time.perf_counter(), []
        for piece in generation.stream(model, tokenizer, messages, 40, past=past):
            pieces.append(piece)
            first = first or time.perf_counter() - started
        turns.append((time.perf_counter() - started) / max(1, len(pieces)))
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return {"first piece": first, "first turn": 1000 * turns[0], "tenth turn": 1000 * turns[-1]}


def answering(way: str, count: int, out: str) -> dict[str, Any]:
    """Answers to dev rows by `answers`, or by bare calls of `generate` in order of length."""
    profile, tokenizer, model, _ = nano(8)
    held = [row for rows in held_out.read_held_out(profile, "dev").values() for row in rows]
    asked = [to_messages(row)[:-1] for row in held[:: max(1, len(held) // count)]]
    generation.answers(model, tokenizer, asked[:4], 4)
    started = time.perf_counter()
    if way == "answers":
        generation.answers(model, tokenizer, asked, 64)
        return {"seconds": time.perf_counter() - started}
    prompts = sorted((prompt_ids(tokenizer, messages) for messages in asked), key=len)
    for begin in range(0, len(prompts), 32):
        batch = [{"input_ids": ids} for ids in prompts[begin : begin + 32]]
        padded = tokenizer.pad(batch, padding_side="left", return_tensors="pt")
        with torch.inference_mode():
            model.generate(**padded, max_new_tokens=64, do_sample=False)
    return {"seconds": time.perf_counter() - started}


def one_size(axis: str, size: int, padded: bool, out: str) -> dict[str, Any]:
    """Seconds of a step and MiB at the peak, for a random model like nano with one size changed."""
    sizes = {"length": 64, "batch": 8, "layers": 4, "vocabulary": 5_000, axis: size}
    profile, tokenizer, model, _ = nano(
        8, **{"training.per_device_batch_size": sizes["batch"], **(PADDED if padded else {})}
    )
    config = GlmConfig(
        **{**model.config.to_dict(), "num_hidden_layers": sizes["layers"], "vocab_size": sizes["vocabulary"]}
    )
    torch.manual_seed(0)
    model = GlmForCausalLM(config)
    steps, lengths = 10, [sizes["length"], max(8, sizes["length"] // 4)]  # unlike rows, as in real data
    ids = [[7 + number % 900] * lengths[number % 2] for number in range(sizes["batch"] * steps)]
    rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    clock = Clock()
    training.build_trainer(model, tokenizer, rows, None, profile, out, [clock]).train()
    return {"seconds": clock.a_step(), "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each for each in (time_to_accuracy, step, first_and_tenth, answering, one_size)
}


def measure(out: Path, name: str, environment: Mapping[str, str] | None = None, **arguments: Any) -> dict[str, Any]:
    """What one measurement finds in a new process; its failure names the process's last line."""
    job = [
        sys.executable,
        "-m",
        "benchmarks.speed",
        "--measure",
        name,
        json.dumps({**arguments, "out": str(out / "run")}),
    ]
    done = subprocess.run(
        job, cwd=HERE.parent, env={**os.environ, **(environment or {})}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} {arguments} failed: {(done.stderr.strip() or 'no output').splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def in_turn(rounds: int, ways: Mapping[str, Callable[[], dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """All ways once a round, so that a slow minute of the machine meets all of them."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, act in ways.items():
            found[way].append(act())
            print(f"{way}: {found[way][-1]}", flush=True)
    return found


# Sections: what is compared, and its table


def accuracy_section(out: Path, dry: bool) -> dict[str, Any]:
    limit, dev_rows, seeds = (4, 12, 1) if dry else (300, 180, 3)
    found: dict[str, list] = {system: [] for system in list(SYSTEMS)[: 2 if dry else None]}
    for seed in range(seeds):
        for system in found:
            run = measure(out, "time_to_accuracy", system=system, seed=seed, limit=limit, dev_rows=dev_rows)
            found[system].append(run["points"])
            print(system, run["points"][-1], flush=True)
    return {"limit": limit, "points": found}


def step_section(out: Path, dry: bool) -> dict[str, Any]:
    ways = ("this course", "bare loop", "padded", "torch.compile")
    steps, rounds = (8, 1) if dry else (60, 3)
    return in_turn(rounds, {way: lambda way=way: measure(out, "step", way=way, steps=steps) for way in ways})


def busy_section(out: Path, dry: bool) -> dict[str, Any]:
    steps, rounds = (8, 1) if dry else (60, 3)

    def act(environment: Mapping[str, str], busy: bool) -> dict[str, Any]:
        other = subprocess.Popen([sys.executable, "-c", SPIN]) if busy else None
        try:
            return measure(out, "step", environment, way="this course", steps=steps)
        finally:
            if other:
                other.kill()
                other.wait()

    return in_turn(
        rounds,
        {
            f"{name}{', beside a busy core' if busy else ''}": lambda environment=environment, busy=busy: act(
                environment, busy
            )
            for name, environment in list(WAITING.items())[: 1 if dry else None]
            for busy in (False, True)
        },
    )


def answers_section(out: Path, dry: bool) -> dict[str, Any]:
    count, rounds = (8, 1) if dry else (256, 3)
    ways = {way: lambda way=way: measure(out, "answering", way=way, count=count) for way in ("answers", "bare loop")}
    return in_turn(rounds, {"a conversation": lambda: measure(out, "first_and_tenth"), **ways})


def growth_section(out: Path, dry: bool) -> dict[str, Any]:
    axes = {"length": (32, 64)} if dry else GROWTH
    ways = {
        f"{axis} {size}{' padded' if padded else ''}": lambda axis=axis, size=size, padded=padded: measure(
            out, "one_size", axis=axis, size=size, padded=padded
        )
        for axis, sizes in axes.items()
        for size in sizes
        for padded in (False, True)
    }
    return in_turn(1 if dry else 2, ways)


SECTIONS: dict[str, Callable[[Path, bool], dict[str, Any]]] = {
    "accuracy": accuracy_section,
    "step": step_section,
    "busy": busy_section,
    "answers": answers_section,
    "growth": growth_section,
}


# The report


def median_and_spread(values: list[float], digits: int = 0) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def table(columns: tuple[str, ...], rows: Iterator[tuple]) -> list[str]:
    lines = [columns, ("---",) * len(columns), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def milliseconds(runs: list[dict[str, Any]]) -> list[float]:
    return [1000 * run["seconds"] for run in runs]


def accuracy_lines(found: dict[str, Any]) -> list[str]:
    best = max(right for runs in found["points"].values() for points in runs for _, _, right, _ in points)
    reached = {
        system: [next((point for point in points if point[2] >= SHARE * best), None) for points in runs]
        for system, runs in found["points"].items()
    }

    def rows() -> Iterator[tuple]:
        ours = [point[0] for point in reached["this course"] if point]
        for system, points in reached.items():
            highest = statistics.median(max(point[2] for point in run) for run in found["points"][system])
            if None in points:
                yield (
                    system,
                    f"not in {found['limit']} s ({len(points) - points.count(None)} of {len(points)})",
                    "",
                    f"{highest:.0%}",
                    "",
                )
                continue
            seconds = [point[0] for point in points]
            known = min(point[3] for point in points)
            ratio = f"{statistics.median(seconds) / statistics.median(ours):.1f}" if ours else ""
            yield system, median_and_spread(seconds), ratio, f"{highest:.0%}", f"{known:.0%}"

    columns = ("system", f"s to {SHARE * best:.0%} of dev rows", "times this course", "highest", "facts still known")
    return table(columns, rows())


def step_lines(found: dict[str, Any]) -> list[str]:
    course = statistics.median(milliseconds(found["this course"]))
    return table(
        ("step of", "ms", "of the course's"),
        (
            (way, median_and_spread(ms := milliseconds(runs)), f"{statistics.median(ms) / course:.2f}")
            for way, runs in found.items()
        ),
    )


def busy_lines(found: dict[str, Any]) -> list[str]:
    def rows() -> Iterator[tuple]:
        for name in (name for name in WAITING if name in found):
            alone, beside = milliseconds(found[name]), milliseconds(found[f"{name}, beside a busy core"])
            ratio = statistics.median(beside) / statistics.median(alone)
            yield name, median_and_spread(alone), median_and_spread(beside), f"{ratio:.1f}"

    return table(("threads", "ms a step, alone", "beside one busy core", "times as long"), rows())


def answers_lines(found: dict[str, Any]) -> list[str]:
    told = found["a conversation"]
    ours, bare = (statistics.median(run["seconds"] for run in found[way]) for way in ("answers", "bare loop"))
    rows = [
        ("first piece, s", median_and_spread([run["first piece"] for run in told], 2)),
        ("first turn, ms a token", median_and_spread([run["first turn"] for run in told])),
        ("tenth turn, ms a token", median_and_spread([run["tenth turn"] for run in told])),
        ("tenth turn, times the first", median_and_spread([run["tenth turn"] / run["first turn"] for run in told], 2)),
        ("`answers`, times a bare loop", f"{ours / bare:.2f}"),
    ]
    return table(("answers", "median (lowest–highest)"), iter(rows))


def growth_lines(found: dict[str, Any]) -> list[str]:
    def rows() -> Iterator[tuple]:
        for axis, sizes in GROWTH.items():
            for ending, name in (("", "joined"), (" padded", "padded")):
                runs = [(size, found[f"{axis} {size}{ending}"]) for size in sizes if f"{axis} {size}{ending}" in found]
                if not runs:
                    continue
                steps = [f"{size}: {statistics.median(milliseconds(each)):.0f}" for size, each in runs]
                memory = [f"{statistics.median(run['mib'] for run in each):.0f}" for _, each in (runs[0], runs[-1])]
                yield axis, name, ", ".join(steps), " to ".join(memory)

    return ["![Milliseconds a step and memory over each size](growth.svg)", ""] + table(
        ("size", "batches", "ms a step", "MiB at the peak"), rows()
    )


LINES: dict[str, tuple[str, Callable[[dict[str, Any]], list[str]]]] = {
    "accuracy": ("Seconds to accuracy", accuracy_lines),
    "step": ("The step", step_lines),
    "busy": ("A busy machine", busy_lines),
    "answers": ("Answers", answers_lines),
    "growth": ("Growth", growth_lines),
}


def growth_figure(found: dict[str, Any], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    measured = {axis: sizes for axis, sizes in GROWTH.items() if f"{axis} {sizes[0]}" in found}
    for column, (axis, sizes) in enumerate(measured.items()):
        for row, (unit, key) in enumerate((("ms a step", "seconds"), ("MiB at the peak", "mib"))):
            ax = figure.add_subplot(2, len(measured), 1 + row * len(measured) + column)
            for ending, name in (("", "joined (padding_free)"), (" padded", "padded")):
                points = [
                    (size, found[f"{axis} {size}{ending}"]) for size in sizes if f"{axis} {size}{ending}" in found
                ]
                scale = 1000 if key == "seconds" else 1
                ax.plot(
                    [size for size, _ in points],
                    [scale * statistics.median(run[key] for run in each) for _, each in points],
                    "o-",
                    label=name,
                )
            ax.set(xscale="log", yscale="log", xlabel=axis, ylabel=unit if column == 0 else "")
    figure.axes[0].legend(fontsize=8)
    figure.savefig(file)


def report(results: dict[str, Any]) -> str:
    lines = [
        "# Speed",
        "",
        "Written by `python -m benchmarks.speed`. Compare ratios, not milliseconds with those of another machine.",
        "",
    ]
    lines += [f"{results['machine']}", ""]
    for section, (title, render) in LINES.items():
        if section in results:
            lines += [f"## {title}", "", *render(results[section]), ""]
    return "\n".join(lines)


def machine() -> str:
    return ", ".join([str(this_machine()), *(f"{name} {version(name)}" for name in ("transformers", "trl", "peft"))])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/speed"), help="for runs and results (default: %(default)s)"
    )
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--dry-run", action="store_true", help="every section, too short to mean anything")
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "JSON"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.measure:
        name, given = arguments.measure
        print(json.dumps(MEASUREMENTS[name](**json.loads(given))))
        return 0
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    folder = out if arguments.dry_run else HERE
    kept = folder / "speed.json"
    results = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
    for section in arguments.sections:
        results["machine"], results[section] = machine(), SECTIONS[section](out, arguments.dry_run)
        kept.write_text(json.dumps(results, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    if "growth" in results:
        growth_figure(results["growth"], folder / "growth.svg")
    (folder / "speed.md").write_text(report(results), encoding="utf-8")
    print(report(results))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
