"""The speed benchmark: every section in a short run, and the report's arithmetic."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import speed

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_every_section_runs_and_is_in_the_report(tmp_path):
    published = ROOT / "benchmarks" / "speed.md"
    before = published.read_bytes() if published.exists() else None
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed", "--out", str(tmp_path), "--dry-run"],
        cwd=ROOT,
        timeout=900,
        capture_output=True,
        text=True,
    )
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert {"machine", *speed.SECTIONS} == {*json.loads((tmp_path / "speed.json").read_text(encoding="utf-8"))}
    report = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert all(f"## {title}" in report for title, _ in speed.LINES.values())
    assert (tmp_path / "growth.svg").is_file()
    assert (published.read_bytes() if published.exists() else None) == before, "a dry run is no measurement"


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_seconds_to_accuracy_count_from_the_first_look_above_the_share_of_the_best():
    points = {
        "this course": [[(10, 100, 0.5, 1.0), (20, 200, 0.96, 0.9), (30, 300, 1.0, 0.8)]] * 2,
        "plain TRL, the course's settings": [[(40, 100, 0.95, 1.0)], [(60, 100, 0.97, 0.7)]],
        "the tutorial's recipe": [[(300, 900, 0.4, 1.0)], [(300, 900, 0.95, 1.0)]],
    }
    _, _, ours, plain, recipe = map(cells, speed.accuracy_lines({"limit": 300, "points": points}))
    assert ours == ["this course", "20 (20–20)", "1.0", "100%", "90%"]
    assert plain == ["plain TRL, the course's settings", "50 (40–60)", "2.5", "96%", "70%"]
    assert recipe[1] == "not in 300 s (1 of 2)"


def test_ratios_are_of_medians_of_one_run():
    def runs(*seconds):
        return [{"seconds": each} for each in seconds]

    found = {"this course": runs(0.1, 0.1, 0.9), "bare loop": runs(0.09, 0.09, 0.09)}
    assert [cells(line)[-1] for line in speed.step_lines(found)[2:]] == ["1.00", "0.90"]
    name = next(iter(speed.WAITING))
    busy = {name: runs(0.1, 0.1, 0.2), f"{name}, beside a busy core": runs(0.3, 0.2, 0.9)}
    assert cells(speed.busy_lines(busy)[-1]) == [name, "100 (100–200)", "300 (200–900)", "3.0"]


def test_a_measurement_that_fails_says_which_and_why(tmp_path):
    with pytest.raises(SystemExit, match=r"answering .* failed: .*ZeroDivisionError"):
        speed.measure(tmp_path, "answering", way="answers", count=0)
