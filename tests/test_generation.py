"""Batched, streamed and stopped answers on a random GLM; every model and tokenizer here is real."""

import logging
import random
import threading
import time
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from tiny_models import CHARACTERS, tiny_glm, tiny_tokenizer, write_only
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import GenerationConfig

from glm4_helpers.chat.conversation import Conversation, Reply, Speakers, Turn, history
from glm4_helpers.chat_format import prompt_ids
from glm4_helpers.checks.chat_template import stop_ids
from glm4_helpers.generation import Answer, Past, Sampling, _pieces, answers, continuations, fit_history, stream
from glm4_helpers.support.errors import DataError, SettingError
from nano.tokenizer import glm4_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_glm(tokenizer)


@pytest.fixture(scope="module")
def rambling(tokenizer):
    return write_only(tiny_glm(tokenizer, seed=3), tokenizer, "你好苹果香蕉西瓜天地人")


def user(text):
    return [{"role": "user", "content": text}]


def some_conversations(count, seed=0):
    draw = random.Random(seed)
    return [user("".join(draw.choices(CHARACTERS.strip(), k=draw.randint(1, 60)))) for _ in range(count)]


def force(model, tokenizer, monkeypatch, ids):
    """Let the model answer with these ids, one a step, by overruling its logits; all else stays real."""
    forward = model.forward
    steps = iter(ids)

    def forced(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits[:, -1] = -1e4
        output.logits[:, -1, next(steps)] = 1e4
        return output

    monkeypatch.setattr(model, "forward", forced)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_greedy_answers_do_not_depend_on_the_batch_size(model, tokenizer, penalty):
    conversations = some_conversations(64)
    results = [
        answers(model, tokenizer, conversations, 24, Sampling(repetition_penalty=penalty), size) for size in (1, 7, 64)
    ]
    assert results[0] == results[1] == results[2]
    assert len({answer.text for answer in results[0]}) > 50
    assert 0 < sum(answer.stopped for answer in results[0]) < 64


def test_a_prompt_alone_gives_the_same_as_plain_generate(model, tokenizer):
    messages = user("你好，告诉我你的名字")
    ids = torch.tensor([prompt_ids(tokenizer, messages)])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    new = plain[0, ids.shape[1] :].tolist()
    answer = answers(model, tokenizer, [messages], 20)[0]
    ended = [place for place, token in enumerate(new) if token in stop_ids(tokenizer)]
    assert answer.token_count == (ended[0] if ended else 20)


def test_no_conversations_give_no_answers(model, tokenizer):
    assert answers(model, tokenizer, []) == []
    assert continuations(model, tokenizer, [], 5) == []


@pytest.mark.parametrize("stop", ["<|endoftext|>", "<|user|>", "<|observation|>"])
def test_each_stop_id_ends_an_answer_and_one_newline_is_dropped(model, tokenizer, monkeypatch, stop):
    text = tokenizer("\n\n苹果", add_special_tokens=False)["input_ids"]
    force(model, tokenizer, monkeypatch, [*text, tokenizer.convert_tokens_to_ids(stop)])
    assert answers(model, tokenizer, [user("你好")], 20) == [Answer("\n苹果", True, 4)]


def test_an_answer_at_the_limit_is_not_stopped(model, tokenizer, monkeypatch):
    text = tokenizer("\n苹果", add_special_tokens=False)["input_ids"]
    force(model, tokenizer, monkeypatch, text)
    assert answers(model, tokenizer, [user("你好")], 3) == [Answer("苹果", False, 3)]


def test_control_tokens_in_an_answer_stay_visible(model, tokenizer, monkeypatch):
    ids = tokenizer.convert_tokens_to_ids(["\n", "<|assistant|>", "一", "<|endoftext|>"])
    force(model, tokenizer, monkeypatch, ids)
    assert answers(model, tokenizer, [user("你好")])[0].text == "<|assistant|>一"


def test_temperature_zero_is_greedy_and_silent_whatever_the_model_file_says(model, tokenizer, monkeypatch, caplog):
    chat_model_file = GenerationConfig(
        do_sample=True,
        temperature=0.8,
        top_p=0.8,
        top_k=3,
        repetition_penalty=1.5,
        eos_token_id=[1],
        pad_token_id=1,
    )
    expected = answers(model, tokenizer, some_conversations(5), 12)
    monkeypatch.setattr(model, "generation_config", chat_model_file)
    with caplog.at_level(logging.WARNING):
        assert answers(model, tokenizer, some_conversations(5), 12) == expected
    assert caplog.records == []


def test_sampling_follows_the_seed_and_leaves_the_random_state_alone(rambling, tokenizer):
    conversations = some_conversations(4)
    before = torch.random.get_rng_state()
    first, again, other = (
        answers(rambling, tokenizer, conversations, 20, Sampling(temperature=2.0, top_p=1.0, seed=seed))
        for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_in_training_answers_without_dropout_and_goes_on_training(tokenizer):
    model = tiny_glm(tokenizer, attention_dropout=0.9)
    expected = answers(model, tokenizer, some_conversations(3), 10)
    model.train()
    assert answers(model, tokenizer, some_conversations(3), 10) == expected
    assert model.training


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -1),
        ("temperature", float("nan")),
        ("temperature", "0.6"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("max_new_tokens", 0),
        ("max_new_tokens", 2.5),
        ("repetition_penalty", 0),
        ("repetition_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_settings_out_of_range_name_the_setting_and_its_range(name, value):
    with pytest.raises(SettingError, match=f"{name} can't be") as raised:
        Sampling(**{name: value})
    assert raised.value.fix.startswith(f"Give {name} as ")


def test_a_length_or_a_batch_out_of_range_is_refused_where_it_is_given(model, tokenizer):
    for call in (answers, stream):
        with pytest.raises(SettingError, match="max_new_tokens"):
            call(model, tokenizer, user("你好") if call is stream else [user("你好")], 0)
    with pytest.raises(SettingError, match="batch_size"):
        answers(model, tokenizer, [user("你好")], batch_size=0)


def test_the_length_given_to_a_call_wins_over_that_of_the_sampling(rambling, tokenizer):
    assert [answer.token_count for answer in answers(rambling, tokenizer, [user("你好")], 3, Sampling(9))] == [3]
    assert [answer.token_count for answer in answers(rambling, tokenizer, [user("你好")], sampling=Sampling(9))] == [9]


def test_a_conversation_that_ends_in_an_answer_is_refused_before_anything_runs(model, tokenizer):
    finished = [*user("你好"), {"role": "assistant", "content": "你好"}]
    with pytest.raises(DataError):
        answers(model, tokenizer, [finished])
    with pytest.raises(DataError):
        stream(model, tokenizer, finished)


def test_continuations_see_the_prefix_and_end_before_the_line_end(model, tokenizer, monkeypatch):
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: (seen.append(k["input_ids"].tolist()), forward(*a, **k))[1])
    force(model, tokenizer, monkeypatch, tokenizer("北京。\n中", add_special_tokens=False)["input_ids"])
    assert continuations(model, tokenizer, ["中国"], 5) == ["北京。"]
    assert tokenizer.convert_ids_to_tokens(seen[0][0]) == ["[gMASK]", "<sop>", "中", "国"]


def test_continuations_end_at_longer_texts_and_do_not_depend_on_the_batch(rambling, tokenizer):
    texts = [messages[0]["content"] for messages in some_conversations(9)]
    whole = continuations(rambling, tokenizer, texts, 12, stop_at="")
    assert all(len(text) == 12 for text in whole)
    assert continuations(rambling, tokenizer, texts, 12, stop_at="", batch_size=2) == whole
    ending = whole[0][3:5]
    cut = continuations(rambling, tokenizer, texts, 12, stop_at=ending)
    assert cut == [text.split(ending)[0] for text in whole]


def test_streamed_pieces_join_to_the_answer(model, tokenizer):
    for messages in some_conversations(12, seed=5):
        pieces = []
        generator = stream(model, tokenizer, messages, 24)
        while True:
            try:
                pieces.append(next(generator))
            except StopIteration as end:
                answer = end.value
                break
        assert answer == answers(model, tokenizer, [messages], 24)[0]
        assert "".join(pieces) == answer.text
        assert all(pieces)


def test_of_a_conversation_only_what_is_new_is_computed(rambling, tokenizer):
    past, read = Past(), []
    watched = rambling.register_forward_pre_hook(
        lambda module, arguments, options: read.append(options["input_ids"].shape[1]), with_kwargs=True
    )
    messages, lengths = user("你好"), []
    for question in ("苹果", "香蕉", None):
        del read[:]
        text = "".join(stream(rambling, tokenizer, messages, 8, past=past))
        assert text == answers(rambling, tokenizer, [messages], 8)[0].text
        lengths.append((read[0], len(prompt_ids(tokenizer, messages))))
        messages = [*messages, {"role": "assistant", "content": text}, *user(question)]
    watched.remove()
    assert lengths[0][0] == lengths[0][1]
    # The format's newline was not this model's, so its answers are read again; the prompts before them are not.
    assert all(new == whole - before for (new, whole), (_, before) in zip(lengths[1:], lengths))
    for other in (user("你好香蕉"), user("西瓜")):
        told = "".join(stream(rambling, tokenizer, other, 8, past=past))
        assert told == answers(rambling, tokenizer, [other], 8)[0].text


def test_weights_that_changed_between_turns_are_asked_about_all_of_the_conversation(tokenizer):
    model = write_only(tiny_glm(tokenizer, seed=4), tokenizer, "你好苹果香蕉西瓜天地人")
    conversation = Conversation(Speakers(model, None), tokenizer, Sampling(8))
    for question in ("你好", "苹果"):
        conversation.turns.append(Turn(question, [reply := Reply("base")]))
        list(conversation.write(reply))
        with torch.no_grad():
            model.model.embed_tokens.weight.neg_()
    with torch.no_grad():
        model.model.embed_tokens.weight.neg_()
    messages = [*history(conversation.turns[:1], "base"), *user("苹果")]
    assert reply.text == answers(model, tokenizer, [messages], 8)[0].text


def test_characters_of_several_bytes_are_never_shown_in_part(model, tokenizer, monkeypatch):
    text = "\n鑫😀b龘。"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)
    force(model, tokenizer, monkeypatch, [*ids, tokenizer.eos_token_id])
    assert list(stream(model, tokenizer, user("你好"), 40)) == ["鑫", "😀", "b", "龘", "。"]


def test_bytes_that_never_become_a_character_are_shown_in_the_end(model, tokenizer, monkeypatch):
    broken = tokenizer("鑫", add_special_tokens=False)["input_ids"][:2]
    force(model, tokenizer, monkeypatch, [*broken, tokenizer.eos_token_id])
    assert "".join(stream(model, tokenizer, user("你好"), 40)) == "\ufffd\ufffd"


BACKENDS = {"byte tokens for rare characters": tiny_tokenizer, "bytes throughout": lambda: byte_level_tokenizer()}
WRITTEN = [
    "苹果",
    "👨‍👩‍👧‍👦",
    "e\u0301",
    "\u0915\u094d\u0937",
    "龘鑫😀",
    " ",
    "\n",
    "\ufffd",
    "a b",
    "🇨🇳",
    "，",
    "\u200b",
]


def byte_level_tokenizer():
    """GLM-4's own kind: every token is a run of bytes, and a rare character takes several."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    letters = trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=300)
    backend.train_from_iterator(["苹果苹果你好你好"], letters)
    return glm4_tokenizer(backend)


@pytest.mark.parametrize("kind", BACKENDS)
@given(parts=st.lists(st.sampled_from(WRITTEN) | st.text(max_size=4), max_size=8))
@hypothesis_settings(max_examples=60, deadline=None)
def test_pieces_join_to_what_decode_gives_and_hold_whole_characters(kind, parts):
    tokenizer = kept(kind)
    ids = tokenizer("".join(parts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    pieces = list(_pieces(tokenizer, ids))
    assert "".join(pieces) == tokenizer.decode(ids) == "".join(parts)
    if "\ufffd" not in "".join(parts):
        assert not any("\ufffd" in piece for piece in pieces)


@given(data=st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_pieces_of_any_ids_join_to_what_decode_gives(data):
    tokenizer = kept("bytes throughout")
    ids = data.draw(st.lists(st.integers(0, len(tokenizer) - 1), max_size=30))
    assert "".join(_pieces(tokenizer, ids)) == tokenizer.decode(ids)


@given(data=st.data())
@hypothesis_settings(max_examples=150, deadline=None)
def test_broken_bytes_never_take_a_character_away_that_was_shown(data):
    tokenizer = kept("byte tokens for rare characters")
    numbers = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in range(256)])
    rare = tokenizer("鑫😀你", add_special_tokens=False)["input_ids"]
    ids = data.draw(st.lists(st.sampled_from(numbers + rare * 20), max_size=30))
    pieces, decoded = list(_pieces(tokenizer, ids)), tokenizer.decode(ids)
    rest = iter("".join(pieces))
    assert all(character in rest for character in decoded if character != "\ufffd"), "a character is lost"
    assert ("\ufffd" in decoded) == ("\ufffd" in "".join(pieces))


@cache
def kept(kind):
    return BACKENDS[kind]()


def test_an_event_from_another_thread_stops_the_stream_at_once(rambling, tokenizer):
    stop = threading.Event()
    generator = stream(rambling, tokenizer, user("你好"), 4000, stop_event=stop)
    count = 0
    for _ in generator:
        count += 1
        if count == 20:
            threading.Thread(target=stop.set).start()
            stop.wait()
            asked = time.monotonic()
    assert count < 1000
    assert time.monotonic() - asked < 2
    assert not _answer_threads()


def test_leaving_the_iterator_ends_the_thread(rambling, tokenizer):
    generator = stream(rambling, tokenizer, user("你好"), 4000)
    next(generator)
    assert _answer_threads()
    generator.close()
    assert not _answer_threads()


def test_an_error_in_the_thread_reaches_the_consumer(tokenizer):
    too_few_embeddings = tiny_glm(tokenizer)
    too_few_embeddings.resize_token_embeddings(10)
    with pytest.raises(IndexError):
        list(stream(too_few_embeddings, tokenizer, user("你好"), 10))
    assert not _answer_threads()


def _answer_threads():
    return [thread for thread in threading.enumerate() if thread.name == "answer"]


def turns(count):
    history = []
    for number in range(count):
        history += user(f"一二三{number}") + [{"role": "assistant", "content": f"四五六{number}"}]
    return history


def test_a_history_that_fits_is_left_as_it_is(tokenizer):
    messages = [{"role": "system", "content": "中"}, *turns(3), *user("你好")]
    assert fit_history(tokenizer, messages, len(prompt_ids(tokenizer, messages))) == (messages, 0)


@pytest.mark.parametrize("limit", [20, 25, 30, 40])
def test_the_oldest_turns_go_and_system_prompt_and_question_stay(tokenizer, limit):
    system = {"role": "system", "content": "中国"}
    messages = [system, *turns(6), *user("你好")]
    kept, dropped = fit_history(tokenizer, messages, limit)
    assert 0 < dropped <= 6
    assert kept == [system, *messages[1 + 2 * dropped :]]
    assert len(prompt_ids(tokenizer, kept)) <= limit
    longer = [system, *messages[1 + 2 * (dropped - 1) :]]
    assert len(prompt_ids(tokenizer, longer)) > limit


def test_a_last_message_that_is_too_long_is_refused(tokenizer):
    with pytest.raises(SettingError, match="tokens long; 20 fit"):
        fit_history(tokenizer, [*turns(2), *user("一" * 50)], 20)
