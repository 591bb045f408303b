"""Trains a profile's adapter with TRL's stock SFTTrainer on encoded rows.

The room runs makes a run safe to repeat: what it depends on, checkpoints, results, tracking. Models are loaded in
models, and rows in data and held_out.
"""

from __future__ import annotations

import dataclasses
import gc
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)

from . import models
from .chat_format import prompt_ids
from .checks import adapters, shapes, weights
from .data import can_be_asked, encode_rows, profile_rows
from .held_out import dev_note, train_and_dev
from .machine import gpus, memory
from .machine.room import launched_zero_stage, require_room
from .profiles import Profile, profile_settings
from .rows.files import without_nulls
from .rows.report import rows_report
from .runs import tracking
from .runs.callbacks import AnswerAtCheckpoints, StopAtNan, progress
from .runs.checkpoints import ANSWERS_FILE, MarkComplete, Start, find_start, unfinished_run
from .runs.processes import join_processes, say, shared, sole_use
from .runs.provenance import difference, run_facts, with_dtype
from .runs.results import TrainingResult, load_result, publish, result_of
from .support.errors import DataError, MachineError, SettingError, renamed_names_ignored
from .support.files import read_json, write_json
from .support.paths import CHECKPOINTS, RUN_FILE, TRAINING_FILE, outputs_dir, shown

if TYPE_CHECKING:
    from trl import SFTConfig, SFTTrainer  # slow to import, and not needed to load what is finished

DEV_QUESTIONS = 14
"""Questions from dev rows that are answered at each checkpoint, after the profile's sample prompts."""

_SAME = "settings, rows, base model and versions are the same"


# A run


def train_or_load(
    profile: Profile,
    force: bool = False,
    output_dir: str | Path | None = None,
    resume: bool = True,
    tracking_mode: str = "offline",
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """The finished adapter if it belongs to these settings, rows, base model and versions; otherwise `train`.

    Prints one line that says which of the two it is and why. `force` always trains from the start. Raises what `train`
    does, and ModelError for a base model that is absent or damaged.
    Shown in 04, 4.3.
    """
    join_processes()
    adapter_dir = default_adapter_dir(profile, output_dir)
    reason = "asked for" if force else why_train(profile, adapter_dir)
    if not reason:
        result = dataclasses.replace(load_result(adapter_dir), reason=_SAME)
        say(f"Loaded the adapter in {shown(adapter_dir)}: {result.reason}.")
        return result
    say(f"Training {profile.name}: {reason}.")
    result = train(profile, output_dir, resume and not force, tracking_mode, callbacks)
    return dataclasses.replace(result, reason=reason)


def why_train(profile: Profile, adapter_dir: Path) -> str:
    """Why the finished adapter can't be used for this profile, in words; empty where it can.

    Raises ModelError where the base model, with which the adapter is compared, is absent or damaged.
    """
    record = read_json(adapter_dir / TRAINING_FILE)
    if record is None:
        return f"there is no finished adapter in {shown(adapter_dir)}"
    weights.check_weights(weights.base_folder(profile), profile)
    conversations = train_and_dev(profile)
    changed = _changed_since(record, profile, *conversations)
    if changed:
        return f"the adapter in {shown(adapter_dir)} was made otherwise ({changed})"
    run = unfinished_run(adapter_dir.parent / CHECKPOINTS)
    if run is None or _changed_since(run, profile, *conversations):
        return ""
    return f"a newer run of the same settings in {shown(adapter_dir.parent)} was interrupted"


def _changed_since(record: Mapping[str, Any], profile: Profile, train: Dataset, dev: Dataset | None) -> str:
    """What differs from the record, in words; another number of processes doesn't count."""
    now = run_facts(with_dtype(profile, record), train, dev)
    return difference(record["facts"], {**now, "processes": record["facts"]["processes"]})


def train(
    profile: Profile,
    output_dir: str | Path | None = None,
    resume: bool = True,
    tracking_mode: str = "offline",
    callbacks: Sequence[TrainerCallback] = (),
) -> TrainingResult:
    """Train from the profile's rows to an adapter in `default_adapter_dir(profile, output_dir)`.

    An unfinished run with the same settings, rows, base model and versions resumes from its newest complete checkpoint,
    even if its folder was moved or copied, and gives the result of an uninterrupted run. `resume=False` starts from the
    beginning. An adapter that is already there stays until the new one is complete. With dev rows the checkpoint with
    the lowest dev loss is kept, otherwise the weights of the last step.

    Raises SettingError where another process trains into the same folder, the unfinished run there has other settings,
    several GPUs are visible without a launcher, or the run could teach nothing; DataError and ModelError for rows or
    weights that are absent or don't fit; MachineError for too little memory or disk space.
    """
    join_processes()
    models.check_gpu(profile)
    tracking.check_mode(tracking_mode)
    output = _output(profile, output_dir)
    work = output / CHECKPOINTS
    weights.check_weights(weights.base_folder(profile), profile)
    conversations = train_and_dev(profile)
    if profile.lora is not None:
        _check_targets(profile)
    tokenizer = models.load_tokenizer(profile)
    with sole_use(output), renamed_names_ignored():
        rows = _rows(profile, tokenizer, *conversations)  # before anything of an earlier run is removed
        _check_rows(profile, rows)
        require_room(profile, output, rows.lengths, PartialState().num_processes, launched_zero_stage())
        dtype = models.dtype_reason(profile.dtype)
        profile = shared(lambda: with_dtype(profile, unfinished_run(work) if resume else None))
        facts = run_facts(profile, *conversations)
        start = shared(lambda: find_start(work, facts, resume))
        say(f"Going on from {shown(start.checkpoint)}." if start.checkpoint else "")
        resumed = not dtype.startswith(profile.dtype)
        say(f"Computing in {f'{profile.dtype}, as the interrupted run did' if resumed else dtype}.")
        say(rows_report(*profile_rows(profile, "train_data")))
        say(dev_note(profile, *conversations))
        try:
            return _train(profile, output, tokenizer, rows, facts, start, tracking_mode, callbacks)
        except torch.OutOfMemoryError:
            pass  # its traceback holds the model, so the answer is raised after it is gone
        finally:
            gc.collect()  # TRL's forward closes a circle of references, in which the weights would stay
            torch.cuda.empty_cache()
        raise _out_of_memory(profile, rows, work)


def default_adapter_dir(profile: Profile, output_dir: str | Path | None = None) -> Path:
    """Where `train` puts the finished adapter: adapter/ in the output folder, or model/ for full fine-tuning.

    Shown in 04, 4.2.
    """
    return _output(profile, output_dir) / ("adapter" if profile.lora else "model")


def _output(profile: Profile, output_dir: str | Path | None) -> Path:
    return outputs_dir(profile.name) if output_dir is None else Path(output_dir).expanduser().resolve()


def _train(
    profile: Profile,
    output: Path,
    tokenizer: PreTrainedTokenizerBase,
    rows: _Rows,
    facts: Mapping[str, Any],
    start: Start,
    tracking_mode: str,
    callbacks: Sequence[TrainerCallback],
) -> TrainingResult:
    work = output / CHECKPOINTS
    config = sft_config(profile, work)  # before the model: DeepSpeed's ZeRO-3 loads weights by it
    model = models.load_base_model(profile)
    marking = MarkComplete(profile, start.checkpoint)
    report = tracking.log_answers if tracking_mode != "disabled" else None
    answering = AnswerAtCheckpoints(tokenizer, rows.questions, profile.max_new_tokens, work / ANSWERS_FILE, report)
    patience = profile.training.early_stopping_patience
    stopping = [EarlyStoppingCallback(patience)] if patience else []
    with _tracked(profile, work, start, tracking_mode) as tracker:
        # Progress comes last, as the trainer itself would add it: in a notebook it takes figures out of the metrics.
        all_of_them = [StopAtNan(), marking, answering, *stopping, tracker, *callbacks, progress()]
        present = [callback for callback in all_of_them if callback is not None]
        trainer = build_trainer(model, tokenizer, rows.train, rows.dev, profile, work, present, config)
        trainer.train(resume_from_checkpoint=str(start.checkpoint) if start.checkpoint else None)
    result = result_of(trainer, default_adapter_dir(profile, output), marking.seconds, answering.records, start)
    publish(trainer, profile, result, facts, work)
    return result


@contextmanager
def _tracked(profile: Profile, work: Path, start: Start, mode: str) -> Iterator[TrainerCallback | None]:
    """SwanLab's callback on one tracked run for all of this training, including what came before an interruption.

    The run has the name of its output folder, which tells runs of one profile apart."""
    if not PartialState().is_main_process or mode == "disabled":
        yield None
        return
    run = tracking.start_run(mode, name=work.parent.name, config=profile_settings(profile), earlier=start.tracked)
    write_json(work / RUN_FILE, {**read_json(work / RUN_FILE), "tracking": run.settings()})
    if start.tracked:
        tracking.replay(*start.history(), start.tracked)
    try:
        yield tracking.tracking_callback()
    except BaseException as error:
        tracking.finish_run(error)
        raise
    tracking.finish_run()


def _out_of_memory(profile: Profile, rows: _Rows, work: Path) -> MachineError:
    """The error for a GPU that ran out of memory although the estimate said that the setting fits."""
    setting = memory.setting_of(
        profile, length=rows.longest, gpus=PartialState().num_processes, zero_stage=launched_zero_stage()
    )
    shape = memory.shape_of(shapes.model_config(profile))
    near = memory.nearest_fit(profile, memory.estimate_memory(profile, setting, shape).total_gib - 0.01, setting, shape)
    smaller = f"try {memory.describe(near)}, in another folder (--output)" if near else "take a smaller profile"
    return MachineError(
        f"The GPU has run out of memory for {profile.name} with {memory.describe(setting)}.",
        "Close what else uses the GPU and run it again: it resumes from the newest checkpoint in "
        f"{shown(work)}. Or {smaller}.",
    )


# The trainer


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
    """A stock SFTTrainer for rows with `input_ids` and `labels`, as `data.encode_rows` gives them.

    The trainer puts the LoRA matrices onto `model`. `config` None means `sft_config(profile, output_dir, model.dtype)`.
    Without dev rows there are checkpoints but no evaluation.
    Raises ModelError for LoRA targets that the model does not have.
    Shown in 04, 4.3.
    """
    from trl import SFTTrainer

    config = config or sft_config(profile, output_dir, model.dtype)
    total = _total_steps(config, len(train_rows))
    if profile.training.evaluations_per_run:
        config.eval_steps = config.save_steps = math.ceil(total / profile.training.evaluations_per_run)
    if total == 1:
        config.warmup_steps = 0  # warm-up begins at a learning rate of 0, and the only step would change nothing
    if dev_rows is None or len(dev_rows) == 0:
        dev_rows, config.eval_strategy, config.load_best_model_at_end = None, "no", False
    if profile.lora is not None:
        adapters.check_target_modules(model, profile.lora.target_modules)
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
    return trainer


def _total_steps(config: SFTConfig, rows: int) -> int:
    """Optimizer steps of a whole run, as the trainer counts them."""
    batches = math.ceil(rows / (config.per_device_train_batch_size * config.world_size))
    return math.ceil(config.num_train_epochs * math.ceil(batches / config.gradient_accumulation_steps))


def sft_config(profile: Profile, output_dir: str | Path, dtype: torch.dtype | None = None) -> SFTConfig:
    """TRL's settings for the profile. Checkpoints go to `output_dir`; `dtype` is that of the loaded weights.

    `build_trainer` sets the number of steps between evaluations, since it depends on the rows.
    Shown in 04, 4.2.
    """
    from trl import SFTConfig

    chosen = profile.training
    dtype = dtype or models.resolve_dtype(profile.dtype)
    on_gpu = gpus.default_device().type == "cuda"
    looks = "steps" if chosen.evaluations_per_run else "no"
    padding_free = chosen.padding_free and chosen.per_device_batch_size > 1  # one row alone has no padding
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
        # Autocast pays where bfloat16 is native. A CPU would convert the weights again in every layer, and an older GPU
        # would emulate it, slower than float32.
        bf16=on_gpu and dtype == torch.bfloat16 and gpus.native_bfloat16(),
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=on_gpu,
        ddp_find_unused_parameters=False,  # every LoRA matrix is used in every step
        logging_steps=10,
        logging_nan_inf_filter=False,  # a loss that is not finite would be shown as 0
        eval_strategy=looks,
        save_strategy=looks,
        # A checkpoint of a fully fine-tuned 9B takes 56 GB, with DeepSpeed 132: only the newest and the best are kept.
        save_total_limit=None if profile.lora else 2,
        load_best_model_at_end=looks != "no",
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,
        report_to="none",
        disable_tqdm=True,  # progress is a callback of ours, which suits notebook, terminal and log
    )


def lora_config(profile: Profile) -> LoraConfig:
    """PEFT's settings for the profile's LoRA. Raises SettingError for a profile that trains all weights.

    Shown in 04, 4.2.
    """
    if profile.lora is None:
        raise SettingError(f"{profile.name} has no LoRA settings: it trains all weights.", "Choose a LoRA profile.")
    return LoraConfig(
        r=profile.lora.r,
        lora_alpha=profile.lora.alpha,
        lora_dropout=profile.lora.dropout,
        target_modules=list(profile.lora.target_modules),
        task_type="CAUSAL_LM",
    )


# Rows


@dataclass(frozen=True)
class _Rows:
    """One run's encoded training and dev rows, and the questions it answers at checkpoints."""

    train: Dataset
    dev: Dataset | None
    questions: list[list[dict[str, str]]]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens of each training row."""
        return [len(ids) for ids in self.train["input_ids"]]

    @property
    def longest(self) -> int:
        """The number of tokens of the longest training row."""
        return max(self.lengths)


def _rows(profile: Profile, tokenizer: PreTrainedTokenizerBase, train: Dataset, dev: Dataset | None) -> _Rows:
    encoded = [
        rows and encode_rows(tokenizer, rows, profile.training.max_length, profile.terminator) for rows in (train, dev)
    ]
    if encoded[1] is not None:  # in order of length, dev batches hold little padding
        lengths = [len(ids) for ids in encoded[1]["input_ids"]]
        encoded[1] = encoded[1].select(sorted(range(len(lengths)), key=lengths.__getitem__))
    return _Rows(encoded[0], encoded[1], _questions(profile, tokenizer, dev))


def _questions(profile: Profile, tokenizer: PreTrainedTokenizerBase, dev: Dataset | None) -> list[list[dict[str, str]]]:
    """The profile's sample prompts, then questions from evenly spaced dev rows; each is a list of messages."""
    system = [{"role": "system", "content": profile.system_prompt}] if profile.system_prompt else []
    questions = [[*system, {"role": "user", "content": prompt}] for prompt in profile.sample_prompts]
    if dev is None:
        return questions
    fit = [messages for messages in dev["messages"] if can_be_asked(messages)]
    spaced = fit[:: math.ceil(len(fit) / DEV_QUESTIONS) or 1]
    asked = [without_nulls(messages[:-1]) for messages in spaced]
    longest = profile.training.max_length
    return questions + [messages for messages in asked if len(prompt_ids(tokenizer, messages)) <= longest]


# Runs that could teach nothing


def _check_targets(profile: Profile) -> None:
    """Raise ModelError for LoRA targets that the model lacks, SettingError where two name the same module."""
    model, targets = shapes.meta_model(profile), profile.lora.target_modules
    adapters.check_target_modules(model, targets)
    count = Counter(name for target in targets for name in adapters.check_target_modules(model, [target]))
    module, times = count.most_common(1)[0]
    if times > 1:
        raise SettingError(
            f"lora.target_modules ({', '.join(targets)}) names {module} {times} times.", "Name each module once."
        )


def _check_rows(profile: Profile, rows: _Rows) -> None:
    """Raise SettingError or DataError for rows that these settings can't learn from or can't be judged by."""
    if profile.training.early_stopping_patience and (rows.dev is None or not profile.training.evaluations_per_run):
        raise SettingError(
            "training.early_stopping_patience needs evaluations on dev rows, and this run has none.",
            "Set training.evaluations_per_run and dev_data (or dev_fraction), or leave the patience at null.",
        )
    positions = shapes.model_config(profile).max_position_embeddings
    if rows.longest > positions:
        raise SettingError(
            f"The longest row has {rows.longest:,} tokens, and {profile.name} was made for {positions:,} positions.",
            f"Set training.max_length to {positions} or less: longer rows are then left out and counted.",
        )
    if len(rows.train) > 1 and len(set(map(tuple, rows.train["input_ids"]))) == 1:
        raise DataError(
            f"All {len(rows.train)} rows of {profile.train_data} are the same.", "Give at least two different rows."
        )
