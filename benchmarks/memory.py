"""Measured peaks of training at true shapes on a CPU, and their estimates; writes memory.json and memory.md.

    python -m benchmarks.memory                                   the small cases
    python -m benchmarks.memory glm-4-9b-lora:40:256:1:on:path    one case, with every stage of the path

A case is profile:layers:tokens:rows a step:checkpointing (on, off), and :path where all stages are to be walked.
Results are kept by case, so that a large one can be measured alone, when the machine has the memory to spare.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchmarks import cpu_memory, rehearse
from glm4_helpers.machine import memory
from glm4_helpers.machine.hardware import this_machine
from glm4_helpers.profiles import get_profile
from glm4_helpers.support import files
from glm4_helpers.support.errors import CourseError

HERE = Path(__file__).parent
CASES = (
    "glm-edge-1.5b:2:64:1:off",
    "glm-edge-1.5b:4:64:1:off",
    "glm-edge-1.5b:2:256:1:on",
    "glm-edge-1.5b:4:256:2:on",
    "glm-edge-1.5b:2:512:2:on",
    "glm-edge-1.5b:2:512:2:off",
    "glm-edge-1.5b:28:256:1:on",
    "glm-4-9b-lora:2:64:1:on",
    "glm-4-9b-lora:2:256:1:on",
    "glm-4-9b-lora:2:512:2:off",
    "glm-4-9b-lora:4:256:1:on",
    "glm-4-9b-0414:2:256:1:on",
    "glm-4-9b-qlora:2:256:1:on",
    "glm-4-9b-full:2:64:1:on",
)


def measure(case: str) -> dict:
    """One case: the stages of a rehearsal, and the estimate with its parts."""
    name, layers, tokens, rows, checkpointing, *path = case.split(":")
    profile = get_profile(name, **{"training.gradient_checkpointing": checkpointing == "on"})
    stages = rehearse.STAGES if path else ("train",)
    folder = Path(tempfile.mkdtemp(prefix="glm4-memory-")) / "course"
    try:
        walked = rehearse.rehearse(profile, folder, int(layers), int(tokens), print, int(rows), stages)
    finally:
        shutil.rmtree(folder.parent)
    setting = memory.setting_of(profile, batch_size=int(rows), length=int(tokens))
    estimated = cpu_memory.estimate(profile, setting, rehearse.model_config(profile, int(layers)))
    peak = max(stage.peak_gib for stage in walked if stage.name in ("train", "resume"))
    return {
        "machine": str(this_machine()),
        "measured_gib": peak,
        "estimated_gib": round(estimated.total_gib, 2),
        "error": round(estimated.total_gib / peak - 1, 3),
        "parts_gib": {part: round(size / files.GIB, 3) for part, size in estimated.by_part().items()},
        "stages": [asdict(stage) for stage in walked],
    }


def table(results: dict[str, dict]) -> str:
    """memory.md: measured against estimated, then the stages of each case."""
    worst = max(results, key=lambda case: abs(results[case]["error"]))
    lines = [
        "# Memory of training: measured on a CPU, and estimated",
        "",
        "Training on random weights of the true shape: resident memory above what the imports take, memory-mapped",
        "weights counted; the C library gives freed memory back at once (`MALLOC_MMAP_THRESHOLD_`), as `rehearse`",
        "sets it. A case is profile:layers:tokens:rows a step:checkpointing. With :path behind it, all stages were",
        "walked: the model is built on disk, loaded, trained until the process is killed on purpose in the third",
        "step, trained on from the checkpoint, and the adapter is loaded and answers. *Off by* is the estimate",
        "against the larger peak of the two stages that train: above zero it was too high. Written by `python -m",
        "benchmarks.memory`.",
        "",
        "| case | measured GiB | estimated GiB | off by |",
        "|---|---:|---:|---:|",
    ]
    for case, result in results.items():
        lines.append(
            f"| {case} | {result['measured_gib']:.2f} | {result['estimated_gib']:.2f} | {result['error']:+.1%} |"
        )
    lines += ["", f"Worst: {results[worst]['error']:+.1%} ({worst}).", ""]
    for case, result in results.items():
        stages = [rehearse.Stage(**stage) for stage in result["stages"]]
        lines += [f"## {case}", "", result["machine"], "", rehearse.format_stages(stages), ""]
    return "\n".join(lines)


def main() -> int:
    """Measure the cases and keep what was measured before."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"default: {' '.join(CASES)}")
    file = HERE / "memory.json"
    results = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    for case in parser.parse_args().cases or CASES:
        try:
            results[case] = measure(case)
        except CourseError as error:
            print(f"{case}: {error}", file=sys.stderr)
            continue
        file.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (HERE / "memory.md").write_text(table(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
