"""The whole course in one file: fine-tune glm4-nano with LoRA, and compare its answers before and after.

Transformers, PEFT and TRL only, no glm4_helpers. Read it from top to bottom, then put in your own model and rows.

    python notebooks/one_file.py                        about seven minutes on a CPU
    python notebooks/one_file.py --rows 40 --steps 60   a short try
"""

import argparse
import json
import math
import os
import unicodedata
from pathlib import Path

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the trainer would split each batch over all GPUs that it sees

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

ROOT = Path(__file__).resolve().parents[1]
TEST_SETS = ("unseen_rows", "unseen_entities", "unseen_phrasings", "second_turns")
END = "<|endoftext|>"  # what the model learns to write after each answer
STOPS = (END, "<|user|>", "<|observation|>")  # any of these ends an answer


# Rows and messages


def read(name, limit):
    """The rows of data/NAME.json, or `limit` of them, spread over the file so that every kind of row is there."""
    rows = json.loads((ROOT / "data" / f"{name}.json").read_text(encoding="utf-8"))
    return rows[:: max(1, len(rows) // limit)][:limit] if limit else rows


def to_messages(row):
    """A row as a conversation: system prompt, earlier turns, question, answer."""
    question = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
    turns = [("system", row["system"])] if row.get("system") else []
    for earlier in [*row.get("history", []), [question, row["output"]]]:
        turns += zip(("user", "assistant"), earlier)
    return [{"role": role, "content": content} for role, content in turns]


# The chat format: [gMASK]<sop>, then for each turn <|role|>, a newline and the content


def encode(tokenizer, messages):
    """Token ids, and labels that say which of them are learned: every answer with its newline and its end.

    No token closes a turn, so the next role token follows an answer. The label there is END all the same: that is what
    the model should write. Control tokens are added by id; in a message their names stay ordinary text.
    """
    token = tokenizer.convert_tokens_to_ids
    ids, labels, after_answer = token(["[gMASK]", "<sop>"]), [-100, -100], False
    for message in messages:
        text = "\n" + message["content"]
        body = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        ids += [token(f"<|{message['role']}|>"), *body]
        labels.append(token(END) if after_answer else -100)
        after_answer = message["role"] == "assistant"
        labels += body if after_answer else [-100] * len(body)
    if after_answer:
        ids, labels = [*ids, token(END)], [*labels, token(END)]
    return {"input_ids": ids, "labels": labels}


# Answers and what is right


def answer(model, tokenizer, rows, batch_size=16):
    """The greedy answer to each row, with whether a stop token ended it within 64 tokens (200 for a long reference)."""
    stops, assistant = map(tokenizer.convert_tokens_to_ids, (STOPS, "<|assistant|>"))
    prompts = [[*encode(tokenizer, to_messages(row)[:-1])["input_ids"], assistant] for row in rows]
    limits = [200 if len(tokenizer.tokenize(row["output"])) > 48 else 64 for row in rows]
    order, answers = sorted(range(len(rows)), key=lambda index: (limits[index], len(prompts[index]))), {}
    model.eval()
    for batch in (order[start : start + batch_size] for start in range(0, len(rows), batch_size)):
        inputs = tokenizer.pad({"input_ids": [prompts[i] for i in batch]}, padding_side="left", return_tensors="pt")
        longest, width = max(limits[i] for i in batch), inputs["input_ids"].shape[1]
        with torch.no_grad():
            written = model.generate(**inputs.to(model.device), max_new_tokens=longest, eos_token_id=stops)
        for index, ids in zip(batch, written[:, width:].tolist()):
            ids = ids[: limits[index]]
            end = next((place for place, token in enumerate(ids) if token in stops), len(ids))
            answers[index] = {"text": tokenizer.decode(ids[:end]).removeprefix("\n"), "stopped": end < len(ids)}
    return [answers[index] for index in range(len(rows))]


def clean(text):
    """Text as it is compared: full-width forms become plain ones, and space at the ends is gone."""
    return unicodedata.normalize("NFKC", text).strip()


def is_right(row, answer):
    """The answer as a whole passes the row's check, and it ended by itself."""
    check, given = row["check"], clean(answer["text"])
    if check["type"] != "distinct_of":  # one exact answer, or one of several
        return answer["stopped"] and given in map(clean, check["answers"])
    before, after, comma = (clean(check[part]) for part in ("prefix", "suffix", "separator"))
    items = [clean(item) for item in given.removeprefix(before).removesuffix(after).split(comma)]
    in_form = given.startswith(before) and given.endswith(after) and len(set(items)) == len(items) == check["count"]
    return answer["stopped"] and in_form and set(items) <= set(map(clean, check["members"]))


def interval(right, total, z=1.959964):
    """Wilson's 95 % interval: where the true rate very likely lies, given so many right answers."""
    rate, scale = right / total, 1 + z * z / total
    centre, spread = rate + z * z / (2 * total), z * math.sqrt(rate * (1 - rate) / total + (z / (2 * total)) ** 2)
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def scores(model, tokenizer, test_sets):
    """The table's lines for one model (right answers of each set, stop rate over all), and every answer."""
    lines, answers = {}, {name: answer(model, tokenizer, rows) for name, rows in test_sets.items()}
    for name, rows in test_sets.items():
        right, total = sum(map(is_right, rows, answers[name])), len(rows)
        low, high = interval(right, total)
        lines[name] = f"{right / total:.1%} [{low:.1%}, {high:.1%}]"
    stopped = [given["stopped"] for of_set in answers.values() for given in of_set]
    return {**lines, "stop rate": f"{sum(stopped) / len(stopped):.1%}"}, answers


# The way: model, rows, answers before, training, answers after


def main():
    parser = argparse.ArgumentParser(description="Fine-tune glm4-nano and compare its answers before and after.")
    parser.add_argument("--rows", type=int, default=0, help="only so many training rows, and rows of each test set")
    parser.add_argument("--steps", type=int, default=-1, help="only so many training steps")
    options = parser.parse_args()

    set_seed(42)
    output = ROOT / "outputs" / "one_file"
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "weights" / "glm4-nano")
    model = AutoModelForCausalLM.from_pretrained(ROOT / "weights" / "glm4-nano", dtype=torch.float32)
    test_sets = {name: read(f"test/{name}", options.rows) for name in TEST_SETS}
    train_rows = Dataset.from_list([encode(tokenizer, to_messages(row)) for row in read("train", options.rows)])

    lora = LoraConfig(r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj"], task_type="CAUSAL_LM")
    settings = SFTConfig(
        output_dir=str(output),
        num_train_epochs=3,
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=2e-3,
        warmup_steps=0.02,  # a share of all steps
        gradient_checkpointing=False,
        padding_free=True,  # the rows of a batch stand in one sequence, none sees another
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},  # the rows are encoded already
        bf16=False,
        dataloader_pin_memory=torch.cuda.is_available(),
        save_strategy="no",
        report_to="none",
        seed=42,
    )
    trainer = SFTTrainer(
        model=model, args=settings, train_dataset=train_rows, processing_class=tokenizer, peft_config=lora
    )
    with trainer.model.disable_adapter():  # without the adapter this is the base model
        before, answers_before = scores(trainer.model, tokenizer, test_sets)
    trainer.train()
    trainer.save_model()
    after, answers_after = scores(trainer.model, tokenizer, test_sets)

    kept = json.dumps({"before": answers_before, "after": answers_after}, ensure_ascii=False, indent=1)
    (output / "answers.json").write_text(kept, encoding="utf-8")
    print(f"{'':18}{'before':>26}{'after':>26}")
    for name in before:
        print(f"{name:18}{before[name]:>26}{after[name]:>26}")
    print("The adapter and every answer are in outputs/one_file.")


if __name__ == "__main__":
    main()
