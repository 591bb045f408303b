"""The GPU benchmark without a GPU: every section at a tiny shape, failures that are reported, and the table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from optional_packages import python_path

from benchmarks import gpu

ROOT = Path(__file__).parent.parent


def results(out):
    return [json.loads(line) for line in (out / "results.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_every_section_runs_and_is_in_the_table(tmp_path):
    published = ROOT / "benchmarks" / "gpu.md"
    before = published.read_bytes() if published.exists() else None
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path / "out"), "--dry-run"],
        cwd=ROOT,
        timeout=900,
        env={**os.environ, "PYTHONPATH": python_path("bitsandbytes"), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = results(tmp_path / "out")
    assert [line for line in found if "failed" in line] == []
    assert {line["section"] for line in found} == {"build", *gpu.SECTIONS}
    table = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    for line in found[1:]:
        assert line["case"] == "machine" or f"| {line['case']} |" in table
    assert all(
        line["s_a_step"] > 0 for line in found if line["section"] in ("lora", "full") and "load" not in line["case"]
    )
    assert (published.read_bytes() if published.exists() else None) == before, "a dry run is no measurement"
    assert not (tmp_path / "out" / "course").exists()


def test_a_case_that_fails_is_reported_and_the_next_one_starts(tmp_path):
    bench = gpu.Bench(tmp_path, "lora", until=60, dry=True)
    bench.model = object()
    bench.case("too large", lambda: 1 / 0)
    assert bench.model is None, "an adapter could be left on it"
    bench.case("small", lambda: {"seconds": 1.0})
    bench.until = 0
    bench.case("late", lambda: {"seconds": 2.0})
    assert [line.get("failed") for line in results(tmp_path)] == [
        "ZeroDivisionError: division by zero",
        None,
        "no time was left",
    ]
    table = gpu.render(tmp_path)
    assert "| too large (failed: ZeroDivisionError: division by zero) |  |" in table and "| small | 1.0 |" in table


def test_the_table_sets_measured_figures_against_the_peak_and_the_estimate(tmp_path):
    gpu.write(tmp_path, "machine", "machine", card="A card", torch="2.11")
    gpu.write(tmp_path, "machine", "matrix product, 400 tokens", tflops=400.0)
    measured = {"s_a_step": 0.1, "rows_a_second": 20.0, "tokens_a_second": 3000, "tflops": 100.0, "allocated_gib": 20.0}
    for reserved in (23.0, 22.0):
        gpu.write(
            tmp_path, "lora", gpu.LORA[0][0], **measured, reserved_gib=reserved, estimated_gib=19.8, libraries_gib=0.8
        )
    table = gpu.render(tmp_path)
    assert "card A card, torch 2.11." in table
    (row,) = [line for line in table.splitlines() if line.startswith(f"| {gpu.LORA[0][0]} |")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == ["0.1", "20.0", "3000", "100.0", "25%", "1.7", "20.0", "22.0", "19.8", "-5.0%"]


def test_rows_of_one_batch_differ_in_length():
    """Equal rows would need no mask, and attention would take less than with real rows."""
    assert gpu.row_lengths(512, 4) == [512, 511, 512, 511]
    real = gpu.row_lengths(None, 400)
    assert 130 < sum(real) / 400 < 170 and max(real) <= 512
