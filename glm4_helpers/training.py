"""From a profile to an adapter: stock TRL SFTTrainer on rows that are already encoded, resumable, never half written.

Callbacks are in callbacks, SwanLab in tracking; loading models and rows is left to models and datasets.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from . import models, tracking
from .callbacks import (
    AnswerAtCheckpoints,
    MarkComplete,
    StopAtNan,
    checkpoint_folders,
    is_complete,
    progress,
    read_json,
    write_json,
)
from .chat_format import prompt_ids
from .datasets import can_be_asked, encode_rows, fingerprint, profile_rows, split, without_nulls
from .environment import launched_zero_stage, machine, require_room
from .errors import SettingError
from .paths import CHECKPOINTS, RUN_FILE, TRAINING_FILE, outputs_dir, share_weights, shown
from .profiles import Profile, changes_weights, flat_settings, profile_settings

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer  # slow to import, and not needed to load what is finished

ANSWERS_FILE = "answers.json"

PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")
"""Packages whose versions are recorded with an adapter, and have to match for it to count as this profile's."""

DEV_QUESTIONS = 14
"""Questions of dev rows that are answered at each checkpoint, beside the profile's sample prompts."""

_SAME = "settings, rows, base model and versions are the same"


@dataclass(frozen=True)
class TrainingResult:
    """A finished adapter (or, without LoRA, model) and how its training went.

    ``checkpoints`` holds step, dev_loss, dev_token_accuracy, stop_rate and best for each evaluation; losses are in
    nats per assistant token. The trainer averages dev figures over batches, so they shift with the evaluation batch
    size. ``seconds`` covers all parts of an interrupted run. ``reason`` is why ``train_or_load`` trained it or could
    load it; ``train``, which decides nothing, leaves it empty.
    """

    adapter_dir: Path
    seconds: float
    final_loss: float
    log_history: list[dict[str, Any]]
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    resumed_from: int | None = None
    loaded: bool = False
    reason: str = ""


# The trainer


def lora_config(profile: Profile) -> LoraConfig:
    """PEFT's settings for the profile's LoRA. Raises SettingError for a profile that trains all weights."""
    if profile.lora is None:
        raise SettingError(f"{profile.name} has no LoRA settings: it trains all weights.", "Choose a LoRA profile.")
    return LoraConfig(
        r=profile.lora.r,
        lora_alpha=profile.lora.alpha,
        lora_dropout=profile.lora.dropout,
        target_modules=list(profile.lora.target_modules),
        task_type="CAUSAL_LM",
    )


def sft_config(profile: Profile, output_dir: str | Path, dtype: torch.dtype | None = None) -> SFTConfig:
    """TRL's settings for the profile; checkpoints go to ``output_dir``. ``dtype`` is that of the loaded weights."""
    from trl import SFTConfig

    chosen = profile.training
    dtype = dtype or models.resolve_dtype(profile.dtype)
    on_gpu = models.default_device().type == "cuda"
    looks = "steps" if chosen.evaluations_per_run else "no"
    padding_free = chosen.padding_free and chosen.per_device_batch_size > 1  # one row alone has no padding
    # Below 1 these are shares of the run; 1 itself would be every step.
    share = 1 / chosen.evaluations_per_run if chosen.evaluations_per_run > 1 else 0.999999
    return SFTConfig(
        output_dir=str(output_dir),
        num_train_epochs=chosen.epochs,
        per_device_train_batch_size=chosen.per_device_batch_size,
        per_device_eval_batch_size=chosen.evaluation_batch_size,
        gradient_accumulation_steps=chosen.gradient_accumulation_steps,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type=chosen.lr_scheduler,
        warmup_steps=chosen.warmup_fraction,
        weight_decay=chosen.weight_decay,
        gradient_checkpointing=chosen.gradient_checkpointing,
        seed=chosen.seed,
        data_seed=chosen.seed,
        # Over-long rows are dropped when they are encoded. TRL takes padding_free only without a length to cut at.
        max_length=None if padding_free else chosen.max_length,
        padding_free=padding_free,
        # Rows come with input_ids and labels, and over-long ones are gone: nothing is left to prepare.
        dataset_kwargs={"skip_prepare_dataset": True},
        # Autocast pays on GPUs only; on a CPU it converts the weights again in every layer.
        bf16=on_gpu and dtype == torch.bfloat16,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=on_gpu,
        logging_steps=10,
        logging_nan_inf_filter=False,  # a loss that is not finite would be shown as 0
        eval_strategy=looks,
        eval_steps=share,
        save_strategy=looks,
        save_steps=share,
        # A checkpoint of a fully fine-tuned 9B takes 56 GB, with DeepSpeed 132: the newest and the best have to do.
        save_total_limit=None if profile.lora else 2,
        load_best_model_at_end=looks != "no",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,
    )


def build_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Dataset,
    dev_rows: Dataset | None,
    profile: Profile,
    output_dir: str | Path,
    callbacks: Sequence[TrainerCallback] = (),
    config: SFTConfig | None = None,
) -> SFTTrainer:
    """A stock SFTTrainer for rows with ``input_ids`` and ``labels``, as ``datasets.encode_rows`` gives them.

    The LoRA modules are put onto ``model`` here. ``config`` None means ``sft_config(profile, output_dir)``.
    Without dev rows there are checkpoints but no evaluation.
    Raises ModelError for LoRA targets that the model does not have.
    """
    from trl import SFTTrainer

    config = config or sft_config(profile, output_dir, model.dtype)
    if profile.training.evaluations_per_run:  # as whole steps: with shares, resuming warns of changed settings
        steps = math.ceil(_total_steps(config, len(train_rows)) / profile.training.evaluations_per_run)
        config.eval_steps = config.save_steps = steps
    if dev_rows is None or len(dev_rows) == 0:
        dev_rows, config.eval_strategy, config.load_best_model_at_end = None, "no", False
    if profile.lora is not None:
        models.check_target_modules(model, profile.lora.target_modules)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=train_rows,
        eval_dataset=dev_rows,
        processing_class=tokenizer,
        peft_config=lora_config(profile) if profile.lora else None,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)  # it prints every log as a raw dict
    models.set_stop_ids(trainer.model, tokenizer)
    return trainer


def _total_steps(config: SFTConfig, rows: int) -> int:
    """Optimizer steps of a whole run, as the trainer counts them."""
    batches = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


# Rows


@dataclass(frozen=True)
class _Rows:
    """What one run learns from: encoded rows, and the questions it answers at checkpoints."""

    train: Dataset
    dev: Dataset | None
    questions: list[list[dict[str, str]]]


def _messages(profile: Profile) -> tuple[Dataset, Dataset | None]:
    """Training and dev conversations of the profile."""
    rows = profile_rows(profile, "train_data")
    if profile.dev_data is not None:
        return rows, profile_rows(profile, "dev_data")
    return split(rows, profile.dev_fraction, profile.training.seed) if profile.dev_fraction else (rows, None)


def _rows(profile: Profile, tokenizer: PreTrainedTokenizerBase, train: Dataset, dev: Dataset | None) -> _Rows:
    encoded = [
        rows and encode_rows(tokenizer, rows, profile.training.max_length, profile.terminator) for rows in (train, dev)
    ]
    if encoded[1] is not None:  # in order of length, dev batches hold little padding
        lengths = [len(ids) for ids in encoded[1]["input_ids"]]
        encoded[1] = encoded[1].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return _Rows(encoded[0], encoded[1], _questions(profile, tokenizer, dev))


def _questions(
    profile: Profile, tokenizer: PreTrainedTokenizerBase, dev: Dataset | None
) -> list[list[dict[str, str]]]:
    """The profile's sample prompts, then questions from evenly spaced dev rows that training would keep."""
    system = [{"role": "system", "content": profile.system_prompt}] if profile.system_prompt else []
    questions = [[*system, {"role": "user", "content": prompt}] for prompt in profile.sample_prompts]
    if dev is None:
        return questions
    fit = [messages for messages in dev["messages"] if can_be_asked(messages)]
    spaced = fit[:: math.ceil(len(fit) / DEV_QUESTIONS) or 1]
    asked = [without_nulls(messages[:-1]) for messages in spaced]
    longest = profile.training.max_length
    return questions + [messages for messages in asked if len(prompt_ids(tokenizer, messages)) <= longest]


# What a run depends on


def _facts(profile: Profile, train: Dataset, dev: Dataset | None) -> dict[str, Any]:
    """All that decides what training gives; equal facts, equal adapter (on the same kind of machine)."""
    return {
        "profile": profile_settings(profile),
        "data": {"train": fingerprint(train), "dev": fingerprint(dev) if dev else None},
        "base": models.base_fingerprint(models.base_folder(profile)),
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in PACKAGES},
        "processes": PartialState().num_processes,
    }


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What separates two runs, in words; empty where nothing that matters does."""
    old, new = flat_settings(before), flat_settings(now)
    names = [name for name in {**old, **new} if changes_weights(name.removeprefix("profile."))]
    changed = [name for name in names if old.get(name) != new.get(name)]
    return "; ".join(
        f"{name.removeprefix('profile.')} was {_brief(old.get(name))} and is {_brief(new.get(name))}" for name in changed
    )


def _brief(value: Any) -> str:
    """A setting as it reads in a sentence; of a fingerprint the start is enough."""
    return value[:12] if isinstance(value, str) and re.fullmatch(r"[0-9a-f]{16,}", value) else repr(value)


# Training


def default_adapter_dir(profile: Profile, output_dir: str | Path | None = None) -> Path:
    """Where ``train`` puts the finished adapter: adapter/ in the output folder (without LoRA model/)."""
    return _output(profile, output_dir) / ("adapter" if profile.lora else "model")


def _output(profile: Profile, output_dir: str | Path | None) -> Path:
    return outputs_dir(profile.name) if output_dir is None else Path(output_dir).expanduser().resolve()


def train(
    profile: Profile,
    output_dir: str | Path | None = None,
    resume: bool = True,
    tracking_mode: str = "offline",
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train from the profile's rows to an adapter in ``default_adapter_dir(profile, output_dir)``.

    An unfinished run of the same settings, rows, base and versions goes on from its newest complete checkpoint and
    ends as if it had never stopped; ``resume=False`` starts anew. An adapter that is already there stays until the new
    one is whole. Raises SettingError where another process trains into the same folder or the unfinished run there is
    of other settings, DataError and ModelError for rows or weights that are absent or don't fit, MachineError for too
    little memory or disk space.
    """
    _join_processes()
    tracking.check_mode(tracking_mode)
    output = _output(profile, output_dir)
    models.check_weights(models.base_folder(profile), profile)
    messages = _messages(profile)
    if profile.lora is not None:
        models.check_target_modules(models.meta_model(profile), profile.lora.target_modules)
    tokenizer = models.load_tokenizer(profile)
    with _sole_use(output), _without_known_warnings():
        rows = _rows(profile, tokenizer, *messages)  # before anything of an earlier run is removed
        _require_evaluations(profile, rows)
        facts = _facts(profile, *messages)
        _require_room(profile, output, rows)
        start = _shared(lambda: _start(profile, output / CHECKPOINTS, facts, resume))
        return _train(profile, output, tokenizer, rows, facts, start, tracking_mode, callbacks)


def _require_evaluations(profile: Profile, rows: _Rows) -> None:
    if profile.training.early_stopping_patience and (rows.dev is None or not profile.training.evaluations_per_run):
        raise SettingError(
            "training.early_stopping_patience needs evaluations on dev rows, and this run has none.",
            "Set training.evaluations_per_run and dev_data (or dev_fraction), or leave the patience at null.",
        )


def _require_room(profile: Profile, output: Path, rows: _Rows) -> None:
    """Raise MachineError before anything is written where memory or disk are too small for this run."""
    longest = max(len(ids) for ids in rows.train["input_ids"])
    require_room(profile, output, longest, PartialState().num_processes, launched_zero_stage())


def train_or_load(
    profile: Profile,
    force: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = True,
    tracking_mode: str = "offline",
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """The finished adapter where it is there and belongs to these settings, rows, base and versions; else ``train``.

    Says in one line which of the two it is and why. ``force`` trains from the start whatever is there.
    """
    _join_processes()
    adapter_dir = default_adapter_dir(profile, output_dir)
    reason = "asked for" if force else why_train(profile, adapter_dir)
    if not reason:
        result = dataclasses.replace(_load_result(adapter_dir), reason=_SAME)
        _say(f"Loaded the adapter in {shown(adapter_dir)}: {result.reason}.")
        return result
    _say(f"Training {profile.name}: {reason}.")
    result = train(profile, output_dir, resume and not force, tracking_mode, callbacks)
    return dataclasses.replace(result, reason=reason)


def _train(
    profile: Profile,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: _Rows,
    facts: Mapping[str, Any],
    start: _Start,
    tracking_mode: str,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    work = output / CHECKPOINTS
    dtype = getattr(torch, start.dtype)
    config = sft_config(profile, work, dtype)  # before the model: DeepSpeed's ZeRO-3 loads weights by it
    model = models.load_base_model(profile, dtype)
    marking = MarkComplete(profile, start.checkpoint)
    report = tracking.log_answers if tracking_mode != "disabled" else None
    answering = AnswerAtCheckpoints(
        tokenizer, rows.questions, profile.max_new_tokens, work / ANSWERS_FILE, report
    )
    patience = profile.training.early_stopping_patience
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    with _tracked(profile, output, start, tracking_mode) as tracker:
        own = [StopAtNan(), marking, answering, *stopping, *filter(None, [tracker, progress()])]
        trainer = build_trainer(model, tokenizer, rows.train, rows.dev, profile, work, [*own, *callbacks], config)
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
        models.set_stop_ids(trainer.model, tokenizer)
    result = _result(trainer, output, profile, marking.seconds, answering.records, start)
    _finish(trainer, profile, result, facts, work)
    return result


@contextmanager
def _tracked(profile: Profile, output: Path, start: _Start, mode: str) -> Iterator[TrainerCallback | None]:
    """SwanLab's callback on a run that holds all of this training, also what came before an interruption."""
    if not PartialState().is_main_process or mode == "disabled":
        yield None
        return
    run = tracking.start_run(mode, name=profile.name, config=profile_settings(profile), earlier=start.tracked)
    run_file = output / CHECKPOINTS / RUN_FILE
    write_json(run_file, {**read_json(run_file), "tracking": run.settings()})
    if start.tracked:
        tracking.replay(*_history(start.checkpoint), start.tracked)
    try:
        yield tracking.callback()
    except BaseException as error:
        tracking.finish(error)
        raise
    tracking.finish()


def _history(checkpoint: Path | None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Logs and answers up to a checkpoint; None is the start."""
    if checkpoint is None:
        return [], []
    state = read_json(checkpoint / "trainer_state.json")
    answered = read_json(checkpoint.parent / ANSWERS_FILE) or []
    return state["log_history"], [record for record in answered if record["step"] <= state["global_step"]]


# Where a run starts


@dataclass(frozen=True)
class _Start:
    """Where a run starts: the checkpoint to go on from, the dtype of the weights, and how it was tracked so far."""

    checkpoint: Path | None
    dtype: str
    tracked: dict[str, Any] | None


def _start(profile: Profile, work: Path, facts: Mapping[str, Any], resume: bool) -> _Start:
    """Go on from the newest complete checkpoint of the same run, else begin with an empty folder.

    Raises SettingError for an unfinished run of other settings, rows, base or versions, which stays as it is.
    """
    run = read_json(work / RUN_FILE)
    checkpoint = _newest(work)
    if run is None or not resume or run["finished"]:
        return _anew(profile, work, facts)
    changed = _difference(run["facts"], {**facts, "folder": str(work)})
    if checkpoint is None:
        return _anew(profile, work, facts, None if changed else run)
    if changed:
        raise SettingError(
            f"{shown(work)} holds an unfinished run of another kind: {changed}.",
            "Use its settings to go on with it, or another folder (--output, output_dir) to keep it; "
            "--no-resume (resume=False) starts anew and deletes it.",
        )
    for step, folder in checkpoint_folders(work):
        if step > int(checkpoint.name.rpartition("-")[2]):
            shutil.rmtree(folder)
    _say(f"Going on from {shown(checkpoint)}.")
    return _Start(checkpoint, run["dtype"], run.get("tracking"))


def _newest(work: Path) -> Path | None:
    """The newest complete checkpoint from which training would go on."""
    whole = [folder for _, folder in checkpoint_folders(work) if is_complete(folder)]
    return next((folder for folder in reversed(whole) if not _stopped_early(folder)), None)


def _stopped_early(checkpoint: Path) -> bool:
    """Whether early stopping ended the run here. The trainer forgets that, and the checkpoint before repeats it."""
    state = read_json(checkpoint / "trainer_state.json")
    control = state["stateful_callbacks"].get("TrainerControl", {}).get("attributes", {})
    return bool(control.get("should_training_stop")) and state["global_step"] < state["max_steps"]


def _anew(profile: Profile, work: Path, facts: Mapping[str, Any], cut_short: Mapping[str, Any] | None = None) -> _Start:
    """An empty folder for a new run, or for one that was cut short before its first checkpoint."""
    dtype = cut_short["dtype"] if cut_short else str(models.resolve_dtype(profile.dtype)).removeprefix("torch.")
    tracked = cut_short.get("tracking") if cut_short else None
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    run = {"facts": {**facts, "folder": str(work)}, "dtype": dtype, "finished": False}
    write_json(work / RUN_FILE, run)
    return _Start(None, dtype, tracked)


def _join_processes() -> None:
    """Meet the other processes of `accelerate launch`. On a CPU each takes itself for the only one unless told so."""
    PartialState(cpu=not torch.cuda.is_available())


def _shared(decide: Callable[[], Any]) -> Any:
    """What the main process decides, in every process."""
    return broadcast_object_list([decide() if PartialState().is_main_process else None])[0]


@contextmanager
def _sole_use(output: Path) -> Iterator[None]:
    """Hold the folder's lock, which the system releases when the process ends, in whatever way."""
    from filelock import FileLock, Timeout

    if not PartialState().is_main_process:
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"The output folder {output} can't be created: {error.strerror}.", "Choose another one (--output, output_dir)."
        ) from error
    lock = FileLock(output / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise SettingError(
            f"Another process is training into {shown(output)}.",
            "Wait until it is done or stop it; or choose another folder (--output, output_dir).",
        ) from None
    try:
        yield
    finally:
        lock.release()


# What a run leaves behind


def _result(
    trainer: SFTTrainer,
    output: Path,
    profile: Profile,
    seconds: float,
    answered: Sequence[Mapping[str, Any]],
    start: _Start,
) -> TrainingResult:
    history = trainer.state.log_history
    best = trainer.state.best_global_step
    stop_rates = {record["step"]: record["stop_rate"] for record in answered}
    looks = [
        {
            "step": row["step"],
            "dev_loss": row["eval_loss"],
            "dev_token_accuracy": row["eval_mean_token_accuracy"],
            "stop_rate": stop_rates.get(row["step"]),
            "best": row["step"] == best,
        }
        for row in history
        if "eval_loss" in row
    ]
    return TrainingResult(
        adapter_dir=default_adapter_dir(profile, output),
        seconds=round(seconds, 2),
        final_loss=[row["loss"] for row in history if "loss" in row][-1],
        log_history=history,
        checkpoints=looks,
        best_step=best,
        resumed_from=int(start.checkpoint.name.rpartition("-")[2]) if start.checkpoint else None,
    )


def _finish(
    trainer: SFTTrainer, profile: Profile, result: TrainingResult, facts: Mapping[str, Any], work: Path
) -> None:
    """Write the finished folder under another name, then put it in place in one step."""
    staging = result.adapter_dir.with_name(f".{result.adapter_dir.name}-unfinished")
    _on_main(lambda: shutil.rmtree(staging, ignore_errors=True))
    trainer.save_model(str(staging))  # in every process: weights that are spread out are gathered here
    kind = trainer.accelerator.distributed_type.value
    _on_main(lambda: _complete(staging, profile, result, facts, work, kind))


def _complete(
    staging: Path,
    profile: Profile,
    result: TrainingResult,
    facts: Mapping[str, Any],
    work: Path,
    distributed_type: str,
) -> None:
    (staging / "training_args.bin").unlink(missing_ok=True)
    if profile.lora is not None:
        _keep_adapter_only(staging, profile)
    models.save_adapter_facts(staging, profile)
    share_weights(staging)
    if (work / ANSWERS_FILE).exists():
        shutil.copy(work / ANSWERS_FILE, staging / ANSWERS_FILE)
    write_json(staging / TRAINING_FILE, _record(profile, result, facts, distributed_type))
    _swap(staging, result.adapter_dir)
    write_json(work / RUN_FILE, {**read_json(work / RUN_FILE), "finished": True})


def _keep_adapter_only(folder: Path, profile: Profile) -> None:
    for path in folder.iterdir():
        if not path.name.startswith("adapter_"):
            path.unlink()
    config = read_json(folder / "adapter_config.json")
    config["base_model_name_or_path"] = profile.hub_id or profile.base_model  # not where it was on this machine
    write_json(folder / "adapter_config.json", config)


def _swap(staging: Path, final: Path) -> None:
    """Put ``staging`` in the place of ``final``, which may exist."""
    old = final.with_name(f".{final.name}-old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    staging.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def _on_main(act: Callable[[], Any]) -> None:
    """Act in the main process while the others wait."""
    if PartialState().is_main_process:
        act()
    PartialState().wait_for_everyone()


def _record(
    profile: Profile, result: TrainingResult, facts: Mapping[str, Any], distributed_type: str
) -> dict[str, Any]:
    """The content of training.json."""
    return {
        "facts": dict(facts),
        "seed": profile.training.seed,
        "machine": machine().cpu,
        "distributed_type": distributed_type,
        "seconds": result.seconds,
        "final_loss": result.final_loss,
        "best_step": result.best_step,
        "resumed_from": result.resumed_from,
        "checkpoints": result.checkpoints,
        "log_history": result.log_history,
    }


# Loading what is finished


def why_train(profile: Profile, adapter_dir: Path) -> str:
    """In words, why the finished adapter is not this profile's; empty where it is.

    Raises ModelError where the base model, which the adapter has to be compared with, is absent or damaged.
    """
    record = read_json(adapter_dir / TRAINING_FILE)
    if record is None:
        return f"there is no finished adapter in {shown(adapter_dir)}"
    models.check_weights(models.base_folder(profile), profile)
    now = _facts(profile, *_messages(profile))
    changed = _difference(record["facts"], {**now, "processes": record["facts"]["processes"]})
    if changed:
        return f"the adapter in {shown(adapter_dir)} was made otherwise ({changed})"
    run = read_json(adapter_dir.parent / CHECKPOINTS / RUN_FILE)
    if run is None or run["finished"]:
        return ""
    same = not _difference(run["facts"], {**now, **{name: run["facts"][name] for name in ("processes", "folder")}})
    return f"a newer run of the same settings in {shown(adapter_dir.parent)} was interrupted" if same else ""


def _load_result(adapter_dir: Path) -> TrainingResult:
    record = read_json(adapter_dir / TRAINING_FILE)
    kept = ("seconds", "final_loss", "log_history", "checkpoints", "best_step", "resumed_from")
    return TrainingResult(adapter_dir, **{name: record[name] for name in kept}, loaded=True)


def _say(text: str) -> None:
    if PartialState().is_main_process:
        print(text, flush=True)


@contextmanager
def _without_known_warnings() -> Iterator[None]:
    """Without warnings of TRL and PEFT about names that transformers 5.23 has changed: nothing a learner could do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield
