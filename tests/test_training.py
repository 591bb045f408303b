"""Training on a tiny model: real TRL runs of a few steps, killed and resumed, refused, loaded again."""

import copy
import dataclasses
import gc
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from test_tracking import scalars
from tiny_models import save_model, tiny_glm, tiny_tokenizer
from transformers import TrainerCallback

from glm4_helpers import chat_format, data, models, training
from glm4_helpers.checks import adapters, chat_template
from glm4_helpers.held_out import dev_note, train_and_dev
from glm4_helpers.profiles import get_profile
from glm4_helpers.runs import checkpoints
from glm4_helpers.runs.checkpoints import MARKER, checkpoint_folders, is_complete
from glm4_helpers.runs.provenance import as_trained
from glm4_helpers.support import paths
from glm4_helpers.support.errors import DataError, MachineError, ModelError, SettingError

QUICK = {
    "dtype": "float32",
    "max_new_tokens": 8,
    "training.epochs": 2,
    "training.per_device_batch_size": 4,
    "training.evaluations_per_run": 3,
    "lora.dropout": 0.1,
}


def rows(count: int, seed: int) -> list[dict]:
    numbers = random.Random(seed)
    made = []
    for index in range(count):
        left, right = numbers.randint(0, 99), numbers.randint(0, 9)
        question, answer = f"{left}+{right}等于多少？", f"{left}+{right}={left + right}。"
        made.append({"id": f"{seed}-{index}", "kind": "sum", "instruction": question, "input": "", "output": answer})
    return made


@pytest.fixture(scope="module")
def course(tmp_path_factory) -> Path:
    """A course folder with a tiny base model and a few rows. Copy it before training in it."""
    folder = tmp_path_factory.mktemp("course")
    (folder / "data" / "dev").mkdir(parents=True)
    tokenizer = tiny_tokenizer()
    save_model(folder / "weights" / "glm4-nano", tiny_glm(tokenizer, initializer_range=0.02), tokenizer)
    (folder / "data" / "train.json").write_text(json.dumps(rows(80, 1)), encoding="utf-8")
    (folder / "data" / "dev" / "unseen_rows.json").write_text(json.dumps(rows(20, 16)), encoding="utf-8")
    return folder


@pytest.fixture
def home(course, tmp_path, monkeypatch) -> Path:
    """A copy of the course folder that the helpers take for theirs."""
    shutil.copytree(course, tmp_path / "home")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def quick(**overrides):
    return get_profile("glm4-nano", **QUICK | overrides)


def adapter_bytes(folder: Path) -> bytes:
    return (folder / "adapter_model.safetensors").read_bytes()


def run_jobs(folder: Path, jobs: list[dict]) -> list[int]:
    """Exit statuses of training jobs, -9 for those that were killed."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs), encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    subprocess.run(
        [sys.executable, Path(__file__).with_name("training_worker.py"), file],
        check=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        timeout=1500,
    )
    return json.loads(file.with_suffix(".statuses").read_text())


# Settings and trainer


def test_lora_config_is_the_profile_s():
    config = training.lora_config(get_profile("glm-4-9b-lora"))
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 32, 0.1)
    assert set(config.target_modules) == {"q_proj", "k_proj", "v_proj"}
    with pytest.raises(SettingError, match="no LoRA"):
        training.lora_config(get_profile("glm-4-9b-full"))


def test_sft_config_is_the_profile_s(tmp_path):
    settings = training.sft_config(get_profile("glm-4-9b-lora"), tmp_path, torch.bfloat16)
    assert (settings.learning_rate, settings.num_train_epochs) == (5e-4, 3)
    assert (settings.per_device_train_batch_size, settings.per_device_eval_batch_size) == (2, 4)
    assert settings.gradient_checkpointing and settings.report_to == []
    assert settings.ddp_find_unused_parameters is False
    assert settings.padding_free and settings.max_length is None


@pytest.mark.parametrize(("card", "native"), [("T4", False), ("L4", True)])
def test_autocast_needs_native_bfloat16(card, native, monkeypatch, tmp_path):
    """A T4 answers `is_bf16_supported()` with True, since torch counts emulation."""
    monkeypatch.setattr("trl.SFTConfig", lambda **settings: SimpleNamespace(**settings))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or native)
    assert training.sft_config(get_profile("glm-4-9b-lora"), tmp_path, torch.bfloat16).bf16 is native
    assert training.sft_config(get_profile("glm4-nano"), tmp_path, torch.float32).bf16 is False


def test_nano_trains_without_padding_where_a_batch_has_several_rows(tmp_path):
    settings = training.sft_config(get_profile("glm4-nano"), tmp_path, torch.float32)
    assert settings.padding_free and settings.max_length is None
    one_row = get_profile("glm4-nano", **{"training.per_device_batch_size": 1})
    settings = training.sft_config(one_row, tmp_path, torch.float32)
    assert not settings.padding_free and settings.max_length == 512


def test_the_loss_is_that_of_assistant_tokens(home, tmp_path):
    """The stock trainer's loss on our padded rows equals cross-entropy over the labels that are not IGNORE."""
    profile = quick(**{"lora.dropout": 0.0, "training.padding_free": False})
    tokenizer, model = models.load_tokenizer(profile), models.load_base_model(profile)
    encoded = data.encode_rows(tokenizer, data.load_messages(home / "data" / "train.json"), 512)
    trainer = training.build_trainer(model, tokenizer, encoded, encoded, profile, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    with torch.no_grad():
        given = trainer.compute_loss(trainer.model, dict(batch))
        logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=chat_format.IGNORE
    )
    assert given.item() == pytest.approx(expected.item(), rel=1e-5)


def test_rows_joined_without_padding_give_the_loss_of_each_row_alone(nano_model, nano_tokenizer, tmp_path):
    """On the shipped weights, whose attention has learned to look far back: a row that saw another would tell."""
    shipped = data.load_messages(ROOT / "data" / "train.json").select(range(80))
    encoded = data.encode_rows(nano_tokenizer, shipped, 512)
    model = copy.deepcopy(nano_model)
    trainer = training.build_trainer(model, nano_tokenizer, encoded, None, get_profile("glm4-nano"), tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    starts = (batch["position_ids"][0] == 0).nonzero().flatten().tolist()
    assert batch["input_ids"].shape[0] == 1 and len(starts) == 8
    assert len({stop - start for start, stop in itertools.pairwise(starts)}) > 1  # of unequal length
    with torch.no_grad():
        given = trainer.compute_loss(trainer.model, dict(batch)).item()
    mixed = _summed_loss(nano_model, batch["input_ids"], batch["labels"])
    ends = [*starts[1:], batch["input_ids"].shape[1]]
    alone = sum(
        _summed_loss(nano_model, batch["input_ids"][:, start:end], batch["labels"][:, start:end])
        for start, end in zip(starts, ends)
    )
    count = (batch["labels"] != chat_format.IGNORE).sum().item()
    assert given == pytest.approx(alone / count, rel=1e-5)
    assert abs(mixed / count - given) > 0.01


@torch.no_grad()
def _summed_loss(model, ids: torch.Tensor, labels: torch.Tensor) -> float:
    """Cross-entropy over the labels of one sequence that are not IGNORE, summed; the positions count through."""
    logits = model(input_ids=ids).logits[0, :-1]
    return torch.nn.functional.cross_entropy(
        logits, labels[0, 1:], ignore_index=chat_format.IGNORE, reduction="sum"
    ).item()


def test_the_stop_ids_survive_building_the_trainer(home, tmp_path):
    profile = quick()
    tokenizer, model = models.load_tokenizer(profile), models.load_base_model(profile)
    encoded = data.encode_rows(tokenizer, data.load_messages(home / "data" / "train.json"), 512)
    trainer = training.build_trainer(model, tokenizer, encoded, None, profile, tmp_path)
    assert trainer.model.generation_config.eos_token_id == chat_template.stop_ids(tokenizer)
    assert trainer.model.config.eos_token_id == chat_template.stop_ids(tokenizer)


def test_lora_targets_that_the_model_lacks_are_refused(home):
    with pytest.raises(ModelError, match="gate_proj"):
        training.train(quick(**{"lora.target_modules": ["q_proj", "gate_proj"]}), tracking_mode="disabled")


def test_a_module_that_two_lora_targets_name_is_refused(home):
    with pytest.raises(SettingError, match="names model.layers.0.self_attn.v_proj 2 times"):
        training.train(quick(**{"lora.target_modules": ["v_proj", "self_attn.v_proj"]}), tracking_mode="disabled")


# Whose rows judge


def own_rows(home: Path, count: int) -> str:
    """A file of rows with answers that the course's rows don't have."""
    made = [{**row, "output": f"答案{index}"} for index, row in enumerate(rows(count, 7))]
    (home / "data" / "mine.json").write_text(json.dumps(made), encoding="utf-8")
    return "data/mine.json"


def texts(conversations) -> set[str]:
    return {json.dumps(messages) for messages in conversations["messages"]}


def test_own_rows_are_judged_by_own_rows(home, capsys):
    profile = quick(train_data=own_rows(home, 80), **{"training.epochs": 0.2})
    result = training.train_or_load(profile, tracking_mode="disabled")
    train, dev = train_and_dev(profile)
    every = texts(data.load_messages(home / "data" / "mine.json"))
    assert texts(train) | texts(dev) == every and not texts(train) & texts(dev)
    assert 4 <= len(dev) <= 16
    said = f"Dev set: {len(dev)} of the 80 rows of data/mine.json"
    assert said in capsys.readouterr().out
    asked = json.loads((result.adapter_dir / checkpoints.ANSWERS_FILE).read_text(encoding="utf-8"))[0]["answers"]
    questions = {json.loads(text)[0]["content"] for text in texts(dev)}
    assert questions >= {given["question"] for given in asked[len(profile.sample_prompts) :]}
    assert result.kept.startswith(f"the checkpoint of step {result.best_step}, dev loss")
    assert training.why_train(profile, result.adapter_dir) == ""
    assert train_and_dev(as_trained(quick(), result.adapter_dir))[1]["messages"] == dev["messages"]


def test_too_few_own_rows_are_all_trained_on_and_the_last_step_is_kept(home, capsys):
    profile = quick(train_data=own_rows(home, 9))
    result = training.train(profile, tracking_mode="disabled")
    assert "9 rows are too few to hold some out" in capsys.readouterr().out
    assert result.best_step is None and result.kept.startswith("the weights of the last step, training loss")
    last = checkpoint_folders(result.adapter_dir.parent / "checkpoints")[-1][1]
    assert adapter_bytes(last) == adapter_bytes(result.adapter_dir)


def test_what_a_user_says_about_dev_rows_is_done(home):
    mine = own_rows(home, 80)
    (home / "data" / "judge.json").write_text(json.dumps(rows(6, 8)), encoding="utf-8")
    assert len(train_and_dev(quick(train_data=mine, dev_data="data/judge.json"))[1]) == 6
    assert train_and_dev(quick(train_data=mine, dev_data=None))[1] is None
    assert len(train_and_dev(quick(train_data=mine, dev_fraction=0.5))[1]) > 25
    same = quick(train_data=str(home / "data" / "train.json"))
    assert len(train_and_dev(same)[1]) == 20, "the profile's rows by another path"
    with pytest.raises(SettingError, match="dev_fraction is 0.5, but the dev rows are those of dev_data"):
        train_and_dev(quick(dev_fraction=0.5))


def test_dev_rows_that_are_trained_on_are_counted(home):
    few = rows(80, 1)[:3] + rows(5, 2)
    (home / "data" / "judge.json").write_text(json.dumps(few), encoding="utf-8")
    profile = quick(dev_data="data/judge.json")
    assert dev_note(profile, *train_and_dev(profile)).startswith("3 of the 8 dev rows are training rows too")
    assert dev_note(quick(), *train_and_dev(quick())) == ""


# A run


@pytest.fixture(scope="module")
def finished(course, tmp_path_factory):
    """One finished run with its folder. Don't change it in a test."""
    folder = tmp_path_factory.mktemp("finished") / "home"
    shutil.copytree(course, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(folder))
        return folder, training.train(quick(), tracking_mode="disabled")


def test_a_run_leaves_the_adapter_with_its_record_and_nothing_else(finished):
    folder, result = finished
    assert result.adapter_dir == folder / "outputs" / "glm4-nano" / "adapter"
    assert {path.name for path in result.adapter_dir.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_model_facts.json",
        "training.json",
        "answers.json",
    }
    record = json.loads((result.adapter_dir / "training.json").read_text(encoding="utf-8"))
    assert record["facts"]["profile"]["training"]["epochs"] == 2
    assert record["facts"]["versions"]["torch"] == torch.__version__.split("+")[0]
    assert record["seed"] == 42 and record["machine"] and record["seconds"] > 0
    assert str(folder) not in json.dumps(record)
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == "weights/glm4-nano"


def test_each_checkpoint_has_its_dev_loss_and_stop_rate_and_the_best_one_is_kept(finished):
    _, result = finished
    assert [look["step"] for look in result.checkpoints] == [14, 28, 40]
    assert all(0 <= look["stop_rate"] <= 1 for look in result.checkpoints)
    best = min(result.checkpoints, key=lambda look: look["dev_loss"])
    assert best["best"] and best["step"] == result.best_step
    kept = result.adapter_dir.parent / "checkpoints" / f"checkpoint-{result.best_step}"
    assert adapter_bytes(kept) == adapter_bytes(result.adapter_dir)


def test_answers_to_the_sample_prompts_are_kept_for_each_checkpoint(finished):
    _, result = finished
    records = json.loads((result.adapter_dir / "answers.json").read_text(encoding="utf-8"))
    assert [record["step"] for record in records] == [0, 14, 28, 40]
    for record in records:
        questions = [given["question"] for given in record["answers"]]
        assert questions[:2] == ["你好，告诉我你的名字。", "告诉我1+2等于多少？"] and len(questions) > 10


def test_each_checkpoint_loads_with_the_base_it_belongs_to(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setenv("GLM4_HOME", str(folder))
    checkpoints = [path for _, path in checkpoint_folders(result.adapter_dir.parent / "checkpoints")]
    assert len(checkpoints) == 3
    for path in checkpoints:
        assert adapters.read_adapter_facts(path) == adapters.read_adapter_facts(result.adapter_dir)
        adapters.save_adapter_facts(path, quick())
        assert is_complete(path)
        models.load_adapter(models.load_base_model(quick()), path, quick())


def test_the_adapter_loads_and_is_live(finished, monkeypatch):
    folder, result = finished
    monkeypatch.setenv("GLM4_HOME", str(folder))
    model = models.load_adapter(models.load_base_model(quick()), result.adapter_dir, quick())
    assert any(parameter.any() for name, parameter in model.named_parameters() if "lora_B" in name)


def test_what_is_finished_is_loaded_and_what_has_changed_is_named(finished, monkeypatch, capsys):
    folder, result = finished
    monkeypatch.setenv("GLM4_HOME", str(folder))
    again = training.train_or_load(quick(), tracking_mode="disabled")
    assert again.loaded and dataclasses.replace(again, loaded=False, reason="") == result
    assert again.reason == "settings, rows, base model and versions are the same"
    assert f"Loaded the adapter in outputs/glm4-nano/adapter: {again.reason}." in capsys.readouterr().out
    adapter = training.default_adapter_dir(quick())
    assert training.why_train(quick(title="another title"), adapter) == ""
    assert "training.epochs was 2 and is 3" in training.why_train(quick(**{"training.epochs": 3}), adapter)


def test_other_rows_or_another_base_mean_training_again(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "home")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))
    adapter = training.default_adapter_dir(quick())
    file = tmp_path / "home" / "data" / "train.json"
    file.write_text(json.dumps(rows(80, 9)), encoding="utf-8")
    assert "data.train" in training.why_train(quick(), adapter)
    file.write_text(json.dumps(rows(80, 1)), encoding="utf-8")
    tokenizer = tiny_tokenizer()
    save_model(tmp_path / "home" / "weights" / "glm4-nano", tiny_glm(tokenizer, seed=5), tokenizer)
    assert "base was" in training.why_train(quick(), adapter)


def test_a_finished_adapter_without_its_base_model_is_a_clear_error(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "home")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))
    shutil.rmtree(tmp_path / "home" / "weights")
    with pytest.raises(ModelError, match="glm4-nano is not here"):
        training.train_or_load(quick(), tracking_mode="disabled")


def test_a_run_of_few_steps_without_evaluations_has_a_loss_and_an_adapter(home):
    profile = quick(**{"training.epochs": 0.1, "training.evaluations_per_run": 0})
    result = training.train(profile, tracking_mode="disabled")
    assert result.final_loss > 0 and result.checkpoints == []
    assert (result.adapter_dir / "adapter_model.safetensors").is_file()
    assert not (result.adapter_dir / checkpoints.ANSWERS_FILE).exists()


def test_dev_rows_that_have_no_question_are_not_asked(home):
    file = home / "data" / "dev" / "unseen_rows.json"
    talk = [{"from": "human", "value": "1+1等于多少？"}, {"from": "gpt", "value": "1+1=2。"}]
    odd = [[*talk, talk[0]], [*talk, talk[1]], [{"from": "human", "value": "一" * 600}, talk[1]]]
    file.write_text(json.dumps([{"conversations": turns} for turns in (talk, *odd)]), encoding="utf-8")
    result = training.train(quick(**{"training.epochs": 0.2}), tracking_mode="disabled")
    asked = json.loads((result.adapter_dir / checkpoints.ANSWERS_FILE).read_text(encoding="utf-8"))[0]["answers"]
    assert len(asked) == len(quick().sample_prompts) + 1


def test_a_run_that_breaks_down_ends_before_anything_is_kept(home):
    profile = quick(**{"training.learning_rate": 1e30, "training.evaluations_per_run": 1})
    with pytest.raises(SettingError, match="broke down before step"):
        training.train(profile, tracking_mode="disabled")
    assert not training.default_adapter_dir(profile).exists()


@pytest.mark.parametrize("changed", [{"training.evaluations_per_run": 0}, {"dev_data": None, "dev_fraction": 0.0}])
def test_early_stopping_without_evaluations_is_refused(home, changed):
    with pytest.raises(SettingError, match="early_stopping_patience needs evaluations"):
        training.train(quick(**{"training.early_stopping_patience": 1, **changed}), tracking_mode="disabled")


def test_an_interrupted_run_in_the_place_of_a_finished_one_is_gone_on_with(finished, tmp_path, monkeypatch):
    folder, _ = finished
    shutil.copytree(folder, tmp_path / "home")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path / "home"))
    file = tmp_path / "home" / "outputs" / "glm4-nano" / "checkpoints" / paths.RUN_FILE
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), "finished": False}), encoding="utf-8")
    assert "was interrupted" in training.why_train(quick(), training.default_adapter_dir(quick()))


def test_settings_that_leave_the_weights_alone_mean_no_training(finished, monkeypatch):
    folder, _ = finished
    monkeypatch.setenv("GLM4_HOME", str(folder))
    same = quick(max_new_tokens=9, sample_prompts=["你好"], train_data=str(folder / "data" / "train.json"))
    assert training.why_train(same, training.default_adapter_dir(same)) == ""


def test_weights_can_be_read_by_whoever_can_read_other_new_files(finished):
    _, result = finished
    modes = {(result.adapter_dir / name).stat().st_mode for name in ("adapter_model.safetensors", "training.json")}
    assert len(modes) == 1


def test_a_folder_in_use_is_refused(home):
    from filelock import FileLock

    folder = home / "outputs" / "glm4-nano"
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        with pytest.raises(SettingError, match="Another process is training into outputs/glm4-nano"):
            training.train(quick(), tracking_mode="disabled")


def test_full_fine_tuning_saves_a_model_that_loads(home):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    profile = _full()
    result = training.train(profile, tracking_mode="disabled")
    assert result.adapter_dir.name == "model"
    model = AutoModelForCausalLM.from_pretrained(result.adapter_dir)
    base = models.load_base_model(profile)
    assert not torch.equal(model.lm_head.weight, base.lm_head.weight)
    tokenizer = AutoTokenizer.from_pretrained(result.adapter_dir)
    assert model.generation_config.eos_token_id == chat_template.stop_ids(tokenizer)
    assert not list(result.adapter_dir.glob("optimizer*"))


def _full():
    profile = get_profile("glm4-nano", **{key: value for key, value in QUICK.items() if not key.startswith("lora")})
    training_settings = dataclasses.replace(profile.training, epochs=1, learning_rate=1e-3)
    return dataclasses.replace(profile, lora=None, training=training_settings)


def test_a_run_of_one_step_changes_the_adapter(home):
    """Warm-up starts at a learning rate of 0: the only step of a short run would be lost to it."""
    profile = quick(train_data=own_rows(home, 3), **{"training.epochs": 1})
    result = training.train(profile, tracking_mode="disabled")
    assert max(row["step"] for row in result.log_history) == 1
    models.load_adapter(models.load_base_model(profile), result.adapter_dir, profile)


def test_rows_that_are_all_the_same_are_refused(home):
    (home / "data" / "mine.json").write_text(json.dumps(rows(1, 1) * 5), encoding="utf-8")
    with pytest.raises(DataError, match="All 5 rows of data/mine.json are the same"):
        training.train(quick(train_data="data/mine.json"), tracking_mode="disabled")


def test_rows_beyond_the_model_s_positions_are_refused(home):
    long = [{"instruction": "一" * 5000, "input": "", "output": "二"}, *rows(3, 1)]
    (home / "data" / "mine.json").write_text(json.dumps(long), encoding="utf-8")
    with pytest.raises(SettingError, match="5,00. tokens, and glm4-nano was made for 4,096 positions") as error:
        training.train(quick(train_data="data/mine.json", **{"training.max_length": 6000}), tracking_mode="disabled")
    assert "training.max_length to 4096" in error.value.fix


def test_an_adapter_of_dtype_auto_is_recorded_with_its_dtype_and_counts_on_any_machine(home, monkeypatch):
    here = {"auto": torch.float32}
    resolve = models.resolve_dtype
    monkeypatch.setattr(models, "resolve_dtype", lambda dtype: resolve(here.get(dtype, dtype)))
    profile = quick(dtype="auto", **{"training.epochs": 0.1, "training.evaluations_per_run": 0})
    result = training.train(profile, tracking_mode="disabled")
    record = json.loads((result.adapter_dir / "training.json").read_text(encoding="utf-8"))
    assert record["facts"]["profile"]["dtype"] == "float32"
    here["auto"] = torch.bfloat16
    assert training.why_train(profile, result.adapter_dir) == ""
    other = dataclasses.replace(profile, dtype="bfloat16")
    assert "dtype was 'float32' and is 'bfloat16'" in training.why_train(other, result.adapter_dir)


class Watch(TrainerCallback):
    """Knows whether the model is still in memory; fails as a GPU does that is full, in a step if told so."""

    def __init__(self, full_in: int | None = None) -> None:
        self.full_in = full_in

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.model = weakref.ref(model.get_base_model())

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.full_in:
            raise torch.OutOfMemoryError("CUDA out of memory.")


def test_memory_is_given_back_after_training(home):
    watch = Watch()
    gc.disable()  # or chance may free what training left behind
    try:
        training.train(quick(**{"training.epochs": 0.1}), tracking_mode="disabled", callbacks=[watch])
        assert watch.model() is None
    finally:
        gc.enable()


def test_out_of_memory_is_one_error_and_the_run_goes_on_afterwards(home):
    watch = Watch(full_in=20)
    with pytest.raises(MachineError, match="run out of memory for glm4-nano with batch 4") as error:
        training.train(quick(), tracking_mode="disabled", callbacks=[watch])
    assert "outputs/glm4-nano/checkpoints" in error.value.fix
    assert watch.model() is None
    assert training.train(quick(), tracking_mode="disabled").resumed_from == 14


def test_out_of_memory_names_the_next_smaller_setting():
    rows = SimpleNamespace(longest=512)
    error = training._out_of_memory(get_profile("glm-4-9b-lora"), rows, Path("outputs/try/checkpoints"))
    assert "with batch 2, 512 tokens" in error.problem and "try batch 1, 512 tokens" in error.fix


def test_early_stopping_ends_the_run(home):
    profile = quick(
        **{"training.early_stopping_patience": 1, "training.learning_rate": 0.3, "training.evaluations_per_run": 10}
    )
    result = training.train(profile, tracking_mode="disabled")
    losses = [look["dev_loss"] for look in result.checkpoints]
    assert len(losses) < 10 and losses[-1] >= min(losses[:-1])


# What is shown


@pytest.mark.slow
def test_a_notebook_shows_one_table_of_losses_and_no_noise(home):
    import nbformat
    from nbclient import NotebookClient

    code = f"from glm4_helpers import get_profile, train_or_load\nr = train_or_load(get_profile(**{QUICK!r}))"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(home)}}).execute(env=environment)
    outputs = notebook.cells[0].outputs
    tables = [output["data"]["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert len(tables) == 1 and tables[0].count("<tr>") == 3 and "[40/40" in tables[0]
    for title in ("Step", "Training Loss", "Validation Loss"):
        assert tables[0].count(f"<th>{title}</th>") == 1
    streams = [output for output in outputs if output.output_type == "stream"]
    printed = "".join(output["text"] for output in streams if output.name == "stdout")
    lines = [line for line in printed.splitlines() if "real_accelerator.py" not in line]  # DeepSpeed, where installed
    assert lines == [
        "Training glm4-nano: there is no finished adapter in outputs/glm4-nano/adapter.",
        "Computing in float32: as set.",
        "80 rows read (80 Alpaca)",
        "rows equal to an earlier one: 4",
    ]
    assert "Warning" not in json.dumps(outputs)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_a_bar_with_losses_and_a_log_shows_lines(home, terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    training.train(quick(**{"training.epochs": 0.2}), tracking_mode="disabled")
    printed = capsys.readouterr()
    assert ("4/4" in printed.err and "dev_loss=" in printed.err) is terminal
    assert ("step 4 of 4, loss" in printed.err) is not terminal
    assert "{'" not in printed.out + printed.err, "raw logs"


# Interruptions


def test_a_checkpoint_cut_short_is_not_complete(finished, tmp_path):
    _, result = finished
    folder = tmp_path / "checkpoints"
    shutil.copytree(result.adapter_dir.parent / "checkpoints", folder)
    (_, first), (_, second), (_, third) = checkpoint_folders(folder)
    assert is_complete(first) and is_complete(second) and is_complete(third)
    (first / MARKER).unlink()
    whole = (second / "optimizer.pt").read_bytes()
    (second / "optimizer.pt").write_bytes(whole[:-1])
    (third / "rng_state.pth").unlink()
    assert not any(is_complete(path) for path in (first, second, third))


class Interrupt(TrainerCallback):
    """Ctrl-C after the checkpoint of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def test_a_run_folder_that_was_moved_goes_on_as_if_it_had_stayed(finished, home, tmp_path, recwarn):
    with pytest.raises(KeyboardInterrupt):
        training.train(quick(), tracking_mode="disabled", callbacks=[Interrupt(28)])
    (home / "outputs" / "glm4-nano").rename(tmp_path / "moved")
    result = training.train(quick(), tmp_path / "moved", tracking_mode="disabled")
    assert result.resumed_from == 28
    whole = finished[1]
    assert [row.get("loss") for row in result.log_history] == [row.get("loss") for row in whole.log_history]
    assert adapter_bytes(result.adapter_dir) == adapter_bytes(whole.adapter_dir)


def test_a_copied_run_folder_takes_its_best_checkpoint_from_the_copy_and_leaves_the_first_alone(home, tmp_path):
    other = [{**row, "output": "苹果香蕉西瓜"} for row in rows(20, 16)]  # so that the first checkpoint is the best
    (home / "data" / "judge.json").write_text(json.dumps(other), encoding="utf-8")
    profile = quick(dev_data="data/judge.json", **{"training.learning_rate": 0.1})
    with pytest.raises(KeyboardInterrupt):
        training.train(profile, callbacks=[Interrupt(40)])
    first = home / "outputs" / "glm4-nano"
    shutil.copytree(first, tmp_path / "copy")
    state = json.loads((first / "checkpoints" / "checkpoint-40" / "trainer_state.json").read_text(encoding="utf-8"))
    best = f"checkpoint-{state['best_global_step']}"
    assert best != "checkpoint-40"
    (first / "checkpoints" / best / "adapter_model.safetensors").unlink()
    tracked = set((home / "outputs" / "swanlog").glob("run-*"))
    result = training.train(profile, tmp_path / "copy")
    assert adapter_bytes(tmp_path / "copy" / "checkpoints" / best) == adapter_bytes(result.adapter_dir)
    assert tracked < set((home / "outputs" / "swanlog").glob("run-*")), "the first run's tracked files are its own"


MOMENTS = (["step", 5], ["step", 20], ["checkpoint", 28], ["evaluation", 28], ["adapter", 40])


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_adapter(course, tmp_path):
    """SIGKILL before the first checkpoint, between two, within one, in an evaluation, and in writing the result."""
    names = ["whole", *(f"killed-{number}" for number in range(len(MOMENTS)))]
    for name in names:
        shutil.copytree(course, tmp_path / name)
    job = {"overrides": QUICK, "tracking": "offline"}
    jobs = [{**job, "home": str(tmp_path / "whole")}]
    for name, moment in zip(names[1:], MOMENTS):
        jobs += [{**job, "home": str(tmp_path / name), "kill": moment}, {**job, "home": str(tmp_path / name)}]
    assert run_jobs(tmp_path, jobs) == [0, *[-signal.SIGKILL, 0] * len(MOMENTS)]
    whole = _outcome(tmp_path / "whole")
    resumed = [_outcome(tmp_path / name) for name in names[1:]]
    assert [outcome.pop("resumed_from") for outcome in [whole, *resumed]] == [None, None, 14, 14, 14, 40]
    for moment, outcome in zip(MOMENTS, resumed):
        assert outcome == whole, moment


def _outcome(home: Path) -> dict:
    """What must not depend on an interruption, and where the run went on from."""
    adapter = home / "outputs" / "glm4-nano" / "adapter"
    record = json.loads((adapter / "training.json").read_text(encoding="utf-8"))
    wanted = ("step", "loss", "eval_loss", "learning_rate")
    logs = [{key: row[key] for key in wanted if key in row} for row in record["log_history"]]
    return {
        "adapter": adapter_bytes(adapter),
        "final_loss": record["final_loss"],
        "checkpoints": record["checkpoints"],
        "logs": [row for row in logs if len(row) > 1],
        "answers": json.loads((adapter / "answers.json").read_text(encoding="utf-8")),
        "tracked": _tracked_losses(home),
        "resumed_from": record["resumed_from"],
    }


def _tracked_losses(home: Path) -> dict:
    """The losses of the one tracked run; SwanLab's other figures hold times."""
    (run,) = (home / "outputs" / "swanlog").glob("run-*")
    return {place: value for place, value in scalars(run).items() if place[0] in ("train/loss", "eval/loss")}
