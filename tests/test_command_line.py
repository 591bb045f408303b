"""The command line: help, errors without traceback, exit statuses, JSON alone on standard output, speed of start."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import create_autospec

import pytest
from tiny_models import save_model, tiny_glm, tiny_tokenizer

from glm4_helpers.cli import main as command_line
from glm4_helpers.cli.commands import chosen_profile, parse_setting
from glm4_helpers.cli.commands.evaluate import format_summary, median_and_worst
from glm4_helpers.machine import doctor
from glm4_helpers.support.errors import SettingError

ROOT = Path(__file__).parent.parent
OPTIONS = {
    "doctor": ["--profile", "--json"],
    "train": ["--profile", "--config", "--set", "--output", "--seed", "--force", "--no-resume", "--tracking", "--json"],
    "evaluate": ["--profile", "--half", "--adapter", "--seeds", "--json"],
    "chat": ["--profile", "--adapter", "--base", "--system", "--temperature", "--max-new-tokens"],
}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    """The command line in a process of its own, as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "glm4_helpers", *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        stdin=subprocess.DEVNULL,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.mark.parametrize("folder", ["outputs/glm-4-9b-full", "elsewhere"])
def test_after_full_fine_tuning_chat_takes_the_trained_model_and_over_a_pipe_shows_no_loading_bar(tmp_path, folder):
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / folder / "model", tiny_glm(tokenizer), tokenizer)
    given = [] if folder.startswith("outputs") else ["--adapter", str(tmp_path / folder)]
    command = [
        sys.executable,
        "-m",
        "glm4_helpers",
        "chat",
        "--profile",
        "glm-4-9b-full",
        "--max-new-tokens",
        "3",
        *given,
    ]
    environment = {**os.environ, "GLM4_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        input="你好\n",
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert f"{folder}/model without an adapter" in done.stderr and "Loading" not in done.stderr


def printed_help(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        command_line.main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_with_an_example(capsys):
    text = printed_help(capsys)
    assert all(f"\n    {name} " in text for name in command_line.COMMANDS)
    assert "examples:" in text


@pytest.mark.parametrize("command", command_line.COMMANDS)
def test_help_of_a_command_names_its_options_and_gives_examples(command, capsys):
    text = printed_help(capsys, command)
    assert all(option in text for option in OPTIONS.get(command, []))
    assert f"python -m glm4_helpers {command}" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--profile", "glm4-nan"], "glm4-nano"),
        (["evaluate", "--profile", "glm-4-9b-lra"], "glm-4-9b-lora"),
        (["doctor", "--profile", "nothing-like-it"], "glm4-nano"),
        (["train", "--set", "training.epoch=1"], "training.epochs"),
        (["train", "--set", "training.epochs=many"], "training.epochs"),
        (["train", "--set", "epochs"], "KEY=VALUE"),
        (["train", "--seed", "one"], "--seed"),
        (["train", "--config", "no-such-file.yaml"], "no-such-file.yaml"),
        (["trian"], "Did you mean train?"),
        (["train", "--tracking", "onlin"], "Did you mean offline?"),
        (["evaluate", "--adapter", "a", "--seeds", "1"], "not allowed with"),
        ([], "COMMAND"),
    ],
)
def test_a_wrong_line_gets_one_clear_message_and_status_2(arguments, said, capsys):
    try:
        status = command_line.main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    captured = capsys.readouterr()
    assert status == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ") and "\nFix: " in captured.err
    assert said in captured.err
    assert "Traceback" not in captured.err


def test_an_unknown_profile_from_the_environment_is_an_error_too():
    finished = run("doctor", GLM4_PROFILE="glm4-nanoo")
    assert finished.returncode == 2
    assert "glm4-nano" in finished.stderr and "Traceback" not in finished.stderr


def test_doctor_prints_json_alone_and_its_status_says_whether_all_is_well():
    finished = run("doctor", "--json")
    report = json.loads(finished.stdout)
    assert report["profile"] == "glm4-nano"
    assert finished.returncode == (0 if report["ok"] else 1)


def test_what_libraries_print_does_not_mix_with_the_json(monkeypatch, capsys):
    ask = doctor.doctor

    def talkative(profile):
        print("noise")
        return ask(profile)

    monkeypatch.setattr(doctor, "doctor", talkative)
    command_line.main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["profile"] == "glm4-nano"
    assert captured.err == "noise\n"


def test_ctrl_c_ends_with_status_130_and_no_traceback(monkeypatch, capsys):
    def interrupted(profile):
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "doctor", interrupted)
    assert command_line.main(["doctor"]) == 130
    assert "Traceback" not in capsys.readouterr().err


def test_a_package_that_is_not_installed_is_named_with_its_fix(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "psutil", None)
    assert command_line.main(["doctor"]) == 2
    assert "psutil" in (said := capsys.readouterr().err) and "Fix: python -m pip install" in said


def test_a_reader_that_leaves_early_causes_no_complaint():
    started = subprocess.Popen(
        [sys.executable, "-m", "glm4_helpers", "doctor"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"},
    )
    started.stdout.close()
    assert started.stderr.read() == ""
    started.wait(timeout=60)


@pytest.mark.parametrize(
    ("pair", "key", "value"),
    [
        ("training.epochs=2", "training.epochs", 2),
        ("training.learning_rate=5e-4", "training.learning_rate", 5e-4),
        ("training.gradient_checkpointing=true", "training.gradient_checkpointing", True),
        ("lora.target_modules=[q_proj, v_proj]", "lora.target_modules", ["q_proj", "v_proj"]),
        ("system_prompt=你是助手。", "system_prompt", "你是助手。"),
        ("system_prompt=a=b", "system_prompt", "a=b"),
        ("system_prompt=null", "system_prompt", None),
        ("system_prompt=用一句话回答: 简短", "system_prompt", "用一句话回答: 简短"),
        ("system_prompt=#1", "system_prompt", "#1"),
        ("system_prompt=yes", "system_prompt", "yes"),
        ("system_prompt=2026-01-01", "system_prompt", "2026-01-01"),
        ('system_prompt="7"', "system_prompt", "7"),
    ],
)
def test_values_of_set_are_read_as_a_learner_means_them(pair, key, value):
    assert parse_setting(pair) == (key, value)


@pytest.mark.parametrize("pair", ["epochs", "=1", ""])
def test_a_set_without_key_or_value_is_refused(pair):
    with pytest.raises(SettingError, match="KEY=VALUE"):
        parse_setting(pair)


def test_config_then_set_then_seed_change_the_profile(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("profile: glm-4-9b-lora\ntraining:\n  epochs: 1\n  seed: 5\nlora.r: 4\n", encoding="utf-8")
    arguments = command_line.build_parser().parse_args(
        ["train", "--config", str(config), "--set", "lora.r=16", "--set", "training.seed=6", "--seed", "7"]
    )
    profile = chosen_profile(arguments, **{"training.seed": arguments.seed})
    assert profile.name == "glm-4-9b-lora"
    assert (profile.training.epochs, profile.lora.r, profile.training.seed) == (1, 16, 7)


def test_several_seeds_are_summed_up_as_median_and_worst():
    results = [
        {"after": {"sets": {"unseen_rows": {"accuracy": {"accuracy": right}, "stop_rate": stopped}}}}
        for right, stopped in ((0.9, 1.0), (0.8, 0.99), (0.95, 1.0))
    ]
    summary = median_and_worst(results)
    assert summary["unseen_rows accuracy"] == {"median": 0.9, "worst": 0.8}
    assert summary["unseen_rows stop rate"] == {"median": 1.0, "worst": 0.99}
    assert "80.0%" in format_summary(summary)


def test_starting_is_light_beside_importing_torch(report):
    """The package and --help must not pull in the heavy libraries: a small part of torch's own import time."""

    def seconds(*arguments: str) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    torch = seconds("-c", "import torch")
    package, printed = seconds("-c", "import glm4_helpers"), seconds("-m", "glm4_helpers", "--help")
    for name, taken in (("import glm4_helpers", package), ("python -m glm4_helpers --help", printed)):
        report("time to start", f"{name:<30}{taken:6.2f} s, {taken / torch:6.1%} of importing torch ({torch:.2f} s)")
    assert package < 0.5 * torch
    assert printed < 0.5 * torch


def test_help_imports_no_heavy_library():
    heavy = "torch transformers trl peft datasets swanlab matplotlib ipywidgets numpy pandas".split()
    code = (
        "import sys; from glm4_helpers.cli.main import build_parser; build_parser().format_help();"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"


def replaced_with_a_double(monkeypatch, module, name, answer):
    """A stand-in that takes only the arguments that the real function takes."""
    double = create_autospec(getattr(module, name), return_value=answer)
    monkeypatch.setattr(module, name, double)
    return double


def test_chat_hands_its_options_on(monkeypatch, tmp_path):
    from glm4_helpers.chat import terminal

    chat = replaced_with_a_double(monkeypatch, terminal, "run_chat", 0)
    options = ["--temperature", "0.6", "--system", "请简短。", "--max-new-tokens", "9", "--adapter", str(tmp_path)]
    assert command_line.main(["chat", *options]) == 0
    profile, adapter, sampling, system, delimiter = chat.call_args.args
    assert (profile.name, adapter, system, delimiter) == ("glm4-nano", tmp_path, "请简短。", None)
    assert (sampling.temperature, sampling.max_new_tokens) == (0.6, 9)
    assert command_line.main(["chat", "--base"]) == 0
    assert chat.call_args.args[1] is None


def test_train_hands_its_options_on_and_prints_figures(monkeypatch, tmp_path, capsys):
    from glm4_helpers import training

    result = SimpleNamespace(
        adapter_dir=tmp_path,
        seconds=12.0,
        final_loss=0.25,
        best_step=None,
        kept="the last step",
        log_history=[{"loss": 0.25}],
    )
    train = replaced_with_a_double(monkeypatch, training, "train_or_load", result)
    line = ["train", "--force", "--no-resume", "--seed", "3", "--output", str(tmp_path), "--tracking", "disabled"]
    assert command_line.main([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["final_loss"] == 0.25
    (profile,), keywords = train.call_args
    assert profile.training.seed == 3
    assert keywords == {"force": True, "resume": False, "output_dir": tmp_path, "tracking_mode": "disabled"}
    assert command_line.main(line) == 0
    assert str(tmp_path) in capsys.readouterr().out


def test_evaluate_hands_its_options_on(monkeypatch, tmp_path, capsys):
    from glm4_helpers import evaluation

    scores = replaced_with_a_double(monkeypatch, evaluation, "before_after", {"half": "dev"})
    replaced_with_a_double(monkeypatch, evaluation, "format_table", "the table")
    assert command_line.main(["evaluate", "--half", "dev", "--adapter", str(tmp_path)]) == 0
    assert capsys.readouterr().out == "the table\n"
    profile, adapter, half = scores.call_args.args
    assert (profile.name, adapter, half) == ("glm4-nano", tmp_path, "dev")
    assert command_line.main(["evaluate", "--adapter", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"half": "dev"}


def test_evaluate_over_seeds_trains_each_in_its_own_folder(monkeypatch, tmp_path, capsys):
    from glm4_helpers import evaluation, training

    for name in ("glm4_helpers", "weights"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    scored = {"after": {"sets": {"unseen_rows": {"accuracy": {"accuracy": 0.9}, "stop_rate": 1.0}}}}
    train = replaced_with_a_double(monkeypatch, training, "train_or_load", SimpleNamespace(adapter_dir=tmp_path))
    replaced_with_a_double(monkeypatch, evaluation, "before_after", scored)
    replaced_with_a_double(monkeypatch, evaluation, "format_table", "the table")
    assert command_line.main(["evaluate", "--seeds", "1", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["seeds"]) == ["1", "2"]
    assert printed["summary"]["unseen_rows accuracy"] == {"median": 0.9, "worst": 0.9}
    folders = [call.kwargs["output_dir"] for call in train.call_args_list]
    assert len(set(folders)) == 2
