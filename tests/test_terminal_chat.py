"""The chat through a real terminal (pexpect) and over a pipe, with a small random model that never stops talking.

What the terminal showed is printed when the tests are done.
"""

import io
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from unicodedata import east_asian_width

import pytest
from peft import LoraConfig, get_peft_model
from tiny_models import save_model, tiny_glm, tiny_tokenizer, write_only

from glm4_helpers import models
from glm4_helpers.chat.conversation import Conversation, Speakers, history
from glm4_helpers.chat.terminal import Chat, run_chat
from glm4_helpers.checks import adapters
from glm4_helpers.checks.adapters import checkpoints
from glm4_helpers.data import load_messages
from glm4_helpers.generation import Sampling
from glm4_helpers.profiles import get_profile
from glm4_helpers.support.errors import ModelError, SettingError

pexpect = pytest.importorskip("pexpect", reason="pexpect drives Unix terminals only")

TITLE = "chat in a real terminal"
SHOWN_COLUMNS = 110
CHARACTERS = "你好苹果香蕉西瓜天地人中国北京"
START = """
import sys
from pathlib import Path
from glm4_helpers.generation import Sampling
from glm4_helpers.profiles import get_profile
from glm4_helpers.chat.terminal import run_chat
tokens, options = eval(sys.argv[1])
run_chat(get_profile("glm4-nano", base_model="weights/tiny"), sampling=Sampling(tokens), **options)
"""


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    """A course folder with a base model that writes on and on, an adapter for it and a later checkpoint."""
    folder = tmp_path_factory.mktemp("course")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLM4_HOME", str(folder))
        tokenizer = tiny_tokenizer()
        save_model(folder / "weights/tiny", write_only(tiny_glm(tokenizer, seed=3), tokenizer, CHARACTERS), tokenizer)
        for name, seed in (("adapter", 1), ("checkpoints/checkpoint-20", 2)):
            write_adapter(folder / "outputs/run" / name, seed)
    return folder


def write_adapter(folder, seed):
    import torch

    profile = get_profile("glm4-nano", base_model="weights/tiny")
    torch.manual_seed(seed)
    config = LoraConfig(r=4, lora_alpha=64, target_modules=list(profile.lora.target_modules), init_lora_weights=False)
    get_peft_model(models.load_base_model(profile, "float32"), config).save_pretrained(folder)
    adapters.save_adapter_facts(folder, profile)


def environment(course):
    # Without an answer to its question where the cursor is, prompt_toolkit would wait: pexpect is no full terminal.
    terminal = {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **terminal, "GLM4_HOME": str(course), "PYTHONPATH": str(Path(__file__).parent.parent)}


@pytest.fixture
def terminal(course):
    """Start a chat in a terminal; afterwards it must leave by itself."""
    started = []

    def start(tokens=200, **options):
        command = ["-c", START, repr((tokens, options))]
        child = pexpect.spawn(
            sys.executable,
            command,
            env=environment(course),
            cwd=course,
            encoding="utf-8",
            timeout=60,
            dimensions=(40, 200),
        )
        child.logfile_read = io.StringIO()
        started.append(child)
        child.expect("help lists the commands", timeout=300)  # a busy machine takes minutes to import torch
        prompt(child)
        return child

    yield start
    for child in started:
        child.close(force=True)


def prompt(child):
    child.expect("you:")
    time.sleep(0.2)  # prompt_toolkit goes on drawing and sets up its keys after the prompt's text


def leave(child):
    child.sendline("/exit")
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def screen(output):
    """The lines that a terminal shows after this output: cursor movements and erasures are carried out.

    A wide character takes two columns, the second of them empty; only what prompt_toolkit sends to xterm is known.
    """
    rows, row, column = [[]], 0, 0
    for control, text in re.findall(r"(\x1b\[[0-9;?]*[A-Za-z]|\x1b.|[\r\n\b])|([^\x1b\r\n\b]+)", output):
        for character in text:
            cells = [character] if east_asian_width(character) not in "WF" else [character, ""]
            rows[row] += [" "] * (column - len(rows[row]))
            rows[row][column : column + len(cells)] = cells
            column += len(cells)
        if control == "\n":
            row += 1
            rows += [[]] * (row == len(rows))
        elif control in ("\r", "\b"):
            column = 0 if control == "\r" else max(0, column - 1)
        elif control[:2] == "\x1b[" and control[-1] in "ABCDJK":
            number = int(control[2:-1] or 1) if control[-1] in "ABCD" else 0
            row = max(0, row - number) if control[-1] == "A" else row
            column = max(0, column + {"C": number, "D": -number}.get(control[-1], 0))
            if control[-1] in "JK":
                del rows[row][column:]
            if control[-1] == "J":
                del rows[row + 1 :]
    return ["".join(cells).rstrip() for cells in rows]


def transcript(child, heading, *remarks):
    """What is printed of a chat: long lines are shortened, and the start and the last command are left out."""
    lines = [line for line in screen(child.logfile_read.getvalue()) if line and "/exit" not in line][1:]
    short = [line if len(line) <= SHOWN_COLUMNS else f"{line[:SHOWN_COLUMNS]} …" for line in lines]
    return "\n".join([f"{heading}:", *(f"  {line}" for line in short), *(f"  [{remark}]" for remark in remarks)])


def plain(text):
    """Text without terminal control sequences."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", text)


def last_answer(child, name="glm4-nano"):
    child.expect(rf"{re.escape(name)}: ")
    child.expect(r"\r\n")
    return plain(child.before)


def piped(course, lines, tokens=6, *, timeout=120, **options):
    command = [sys.executable, "-c", START, repr((tokens, options))]
    return subprocess.run(
        command,
        input=lines,
        env=environment(course),
        cwd=course,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


# In a terminal


def test_an_answer_is_seen_growing_and_ctrl_c_stops_it_but_not_the_chat(terminal, course, report):
    child = terminal(3000)
    child.sendline("你好")
    child.expect("glm4-nano: ")
    sizes = [len(child.read_nonblocking(100_000, timeout=20)) for _ in range(5)]
    assert all(0 < size < 1000 for size in sizes)
    child.sendintr()
    asked = time.monotonic()
    child.expect(r"\(stopped\)")
    seconds = time.monotonic() - asked
    assert seconds < 3
    prompt(child)
    child.sendline("/save stopped.json")
    child.expect("saved 2 messages")
    prompt(child)
    leave(child)
    question, answer = json.loads((course / "stopped.json").read_text(encoding="utf-8"))[0]["messages"]
    assert question == {"role": "user", "content": "你好"}
    assert answer["ended_by"] == "stopped"
    assert 0 < len(answer["content"]) < 3000
    pieces = f"the answer came in pieces of {', '.join(map(str, sizes))} characters; Ctrl-C ended it in {seconds:.2f} s"
    report(TITLE, transcript(child, "an answer that streams, and Ctrl-C in the middle of it", pieces), 1)


def test_chinese_is_edited_with_arrows_and_backspace(terminal, course, report):
    child = terminal(5)
    left, right = "\x1b[D", "\x1b[C"
    child.send("苹好果")
    child.send(left + "\x7f")  # 苹|果: the wide character before the cursor goes
    child.send(right + "三" + left + left + "你")  # 苹你果三
    time.sleep(0.5)
    child.send("\r")
    last_answer(child)
    prompt(child)
    child.sendline("/save edited.json")
    child.expect("saved 2 messages")
    prompt(child)
    leave(child)
    assert json.loads((course / "edited.json").read_text(encoding="utf-8"))[0]["messages"][0]["content"] == "苹你果三"
    shown = transcript(child, "Chinese edited: typed 苹好果, left, backspace, right, 三, left, left, 你, Enter")
    assert "you: 苹你果三" in shown
    report(TITLE, shown, 3)


def test_line_breaks_are_typed_with_alt_enter_and_pasted(terminal, course):
    child = terminal(5)
    child.send("天\x1b\r地\x1b[200~苹果\n香蕉\x1b[201~人")  # Alt+Enter, and a bracketed paste
    time.sleep(0.5)
    child.send("\r")
    last_answer(child)
    prompt(child)
    child.sendline("/save broken.json")
    child.expect("saved 2 messages")
    prompt(child)
    leave(child)
    messages = json.loads((course / "broken.json").read_text(encoding="utf-8"))[0]["messages"]
    assert messages[0]["content"] == "天\n地苹果\n香蕉人"


def test_the_adapter_is_switched_and_checkpoints_change_answers(terminal, course, report):
    child = terminal(12, adapter_dir=str(course / "outputs/run/adapter"))

    def ask(name="glm4-nano"):
        child.sendline("天地人")
        answer = last_answer(child, name)
        prompt(child)
        child.sendline("/reset")
        prompt(child)
        return answer

    on = ask()
    child.sendline("/adapter off")
    child.expect("adapter .* off")
    prompt(child)
    off = ask("glm4-nano (adapter off)")
    child.sendline("/adapter on")
    prompt(child)
    assert ask() == on != off
    child.sendline("/checkpoint")
    child.expect("adapter .*checkpoint-20 ")
    prompt(child)
    child.sendline("/checkpoint checkpoint-20")
    child.expect("checkpoint-20 on")
    prompt(child)
    assert ask() not in (on, off)
    child.sendline("/checkpoint adapter")
    child.expect("adapter on")
    prompt(child)
    assert ask() == on
    leave(child)
    report(
        TITLE, transcript(child, "the adapter switched off and on, and another checkpoint").replace(f"{course}/", ""), 2
    )


def test_ctrl_c_at_the_prompt_stays_and_ctrl_d_leaves(terminal):
    child = terminal()
    child.send("你好")
    child.sendintr()
    child.expect("Ctrl-D leaves")
    prompt(child)
    child.sendeof()
    child.expect(pexpect.EOF)
    child.wait()
    assert child.exitstatus == 0


def test_errors_are_shown_in_place_and_the_chat_goes_on(terminal):
    child = terminal(5)
    for line, word in (
        ("/rset", "Try /reset"),
        ("/adapter on", "no adapter to switch"),
        ("/checkpoint nowhere", "no checkpoint nowhere"),
        ("/save /nowhere/at/all.json", "nothing to save"),
    ):
        child.sendline(line)
        child.expect(word)
        prompt(child)
    child.sendline("你好")
    assert len(last_answer(child)) == 5
    child.expect("cut at 5 tokens")
    prompt(child)
    child.sendline("/save /nowhere/at/all.json")
    child.expect("can't be written")
    prompt(child)
    leave(child)


# Over a pipe


def test_over_a_pipe_answers_alone_are_on_standard_output(course):
    done = piped(course, "你好\n\n/system 中国\n天地人\n//help\n/help\n")
    assert done.returncode == 0
    assert re.fullmatch(f"([{CHARACTERS}]{{6}}\n){{3}}", done.stdout)
    assert "you:" not in done.stdout + done.stderr
    assert "system prompt: 中国" in done.stderr
    assert "/checkpoint NAME" in done.stderr
    assert "Traceback" not in done.stderr


def test_over_a_pipe_lines_after_exit_are_not_read(course):
    done = piped(course, "/exit\n你好\n")
    assert (done.returncode, done.stdout) == (0, "")


def test_with_a_delimiter_messages_and_answers_have_several_lines(course):
    lines = "天地\n\n  人\n===\n/save several.json\n===\n\n===\n你好"
    done = piped(course, lines, delimiter="===")
    assert done.returncode == 0 and re.fullmatch(f"([{CHARACTERS}]{{6}}\n===\n){{2}}", done.stdout)
    messages = json.loads((course / "several.json").read_text(encoding="utf-8"))[0]["messages"]
    assert messages[0] == {"role": "user", "content": "天地\n\n  人"}


def test_bytes_that_are_no_utf8_are_answered_as_replacement_characters(course):
    command = [sys.executable, "-c", START, repr((6, {}))]
    done = subprocess.run(
        command, input=b"\xff\xe4\n", env=environment(course), cwd=course, capture_output=True, timeout=120, check=False
    )
    assert re.fullmatch(f"[{CHARACTERS}]{{6}}\n", done.stdout.decode()) and b"Traceback" not in done.stderr


# The conversation itself


@pytest.fixture
def chat(course, monkeypatch):
    monkeypatch.setenv("GLM4_HOME", str(course))
    monkeypatch.chdir(course)
    profile = get_profile("glm4-nano", base_model="weights/tiny")
    model, tokenizer = models.load_base_model(profile, "float32"), models.load_tokenizer(profile)
    return Chat(profile, Conversation(Speakers(model, profile), tokenizer, Sampling(20), system="中国"))


def known(chat):
    """The messages that the next answer follows."""
    return history(chat.talk.turns, "fine-tuned", chat.talk.system)


def test_a_long_conversation_drops_its_oldest_turns_with_a_notice(chat, capsys, monkeypatch):
    monkeypatch.setattr(Speakers, "positions", 100)
    for _ in range(4):
        chat.handle("你好" * 6)
    assert "left out" in capsys.readouterr().err
    assert len(known(chat)) == 9
    assert known(chat)[0] == {"role": "system", "content": "中国"}


def test_a_message_that_is_too_long_is_refused_and_not_kept(chat, capsys, monkeypatch):
    monkeypatch.setattr(Speakers, "positions", 100)
    with pytest.raises(SettingError, match="tokens long"):
        chat.handle("好" * 200)
    assert chat.talk.turns == [] and capsys.readouterr().out == ""


def test_reset_keeps_the_system_prompt_and_none_removes_it(chat):
    chat.handle("你好")
    chat.handle("/reset")
    assert known(chat) == [{"role": "system", "content": "中国"}]
    chat.handle("/system none")
    assert known(chat) == []


def test_retry_asks_the_other_model_the_same_and_keeps_one_answer(chat, course, capsys):
    with pytest.raises(SettingError, match="no message to answer again"):
        chat.handle("/retry")
    chat.use_adapter(course / "outputs/run/adapter")
    chat.handle("你好")
    chat.handle("/adapter off")
    chat.handle("/retry")
    tuned, base = capsys.readouterr().out.splitlines()
    assert tuned != base and [message["content"] for message in known(chat)] == ["中国", "你好", base]


def test_a_retry_that_fails_keeps_the_former_answer(chat, monkeypatch):
    chat.handle("你好")
    before = known(chat)
    monkeypatch.setattr(Speakers, "positions", 22)
    with pytest.raises(SettingError, match="tokens long"):
        chat.handle("/retry")
    assert known(chat) == before


def test_a_saved_conversation_is_training_data_and_is_never_overwritten(chat, tmp_path):
    file = tmp_path / "conversation.json"
    chat.handle("你好")
    chat.handle(f"/save {file}")
    roles = [message["role"] for message in load_messages(file)[0]["messages"]]
    assert roles == ["system", "user", "assistant"]
    before = file.read_bytes()
    with pytest.raises(SettingError, match="File exists"):
        chat.handle(f"/save {file}")
    assert file.read_bytes() == before


def test_an_adapter_that_does_not_fit_leaves_the_chat_as_it_was(chat, course, tmp_path, capsys):
    chat.use_adapter(course / "outputs/run/adapter")
    (tmp_path / "broken").mkdir()
    with pytest.raises(ModelError, match="no adapter in"):
        chat.use_adapter(tmp_path / "broken")
    assert chat.adapter_dir == course / "outputs/run/adapter"
    chat.handle("你好")
    assert len(capsys.readouterr().out.strip()) == 20


def test_a_checkpoint_that_was_trained_again_is_read_again(chat, course, tmp_path, capsys):
    for seed in (1, 2):
        write_adapter(tmp_path / "adapter", seed)
        chat.use_adapter(tmp_path / "adapter")
        chat.handle("天地人")
        chat.handle("/reset")
    first, second = capsys.readouterr().out.splitlines()
    assert first != second


def test_checkpoints_are_listed_in_the_order_of_their_steps(tmp_path):
    for name in ("adapter", "checkpoints/checkpoint-10", "checkpoints/checkpoint-9"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "adapter_config.json").touch()
    assert list(checkpoints(tmp_path)) == ["adapter", "checkpoint-9", "checkpoint-10"]


@pytest.mark.parametrize("given", ["", "adapter"])
def test_a_run_that_was_interrupted_offers_its_checkpoints_by_name(given, tmp_path, monkeypatch):
    for step in (20, 100):
        write_nothing_but_a_config(tmp_path / "run/checkpoints" / f"checkpoint-{step}")
    monkeypatch.setenv("GLM4_HOME", str(tmp_path))
    with pytest.raises(ModelError, match="checkpoint-20, checkpoint-100") as refused:
        run_chat(get_profile("glm4-nano"), tmp_path / "run" / given)
    assert "--adapter run/checkpoints/checkpoint-100" in refused.value.fix


def write_nothing_but_a_config(folder):
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{}")
