"""The notebooks in a real browser: JupyterLab serves them, Chromium opens them, and somebody chats."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
import torch
from conftest import ROOT
from optional_packages import python_path
from test_notebooks import write_few_rows
from test_tracking import dashboard
from tiny_models import save_model, tiny_glm

from nano.pretrain import build_tokenizer

pytestmark = [pytest.mark.slow, pytest.mark.browser]

TOKENS, TRAINING, CHAT = "03_dataset_and_chat_template", "04_lora_sft_training", "06_before_after_comparison"
SCREENSHOTS = Path(os.environ.get("GLM4_SCREENSHOTS") or ROOT / "outputs" / "screenshots")
"""`make notebooks` sets the variable and so refreshes the committed pictures; else they go to the ignored outputs/."""

CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
QUESTION = "大象的英文是什么？"  # What is 'elephant' in English?
FORGED = "<b>粗体</b><img src=x onerror=\"document.title='owned'\">"
SAID_BY_MODEL = "<b>粗体"
SECONDS_FOR_A_NOTEBOOK = 1200
RUNS_COMPARED = {"rate 0.002": [], "rate 0.0005": ["--set", "training.learning_rate=5e-4"]}


# What is opened


def course_folder(home: Path) -> Path:
    """A course with the shipped model, few rows and its notebooks without outputs: what is seen is from this run."""
    for name in ("glm4_helpers", "weights", "images"):
        (home / name).symlink_to(ROOT / name)
    write_few_rows(home / "data")
    copy_notebooks(home)
    return home


def copy_notebooks(home: Path) -> None:
    (home / "notebooks").mkdir(exist_ok=True)
    shutil.copy(ROOT / "notebooks" / "start.py", home / "notebooks")
    for name in (TOKENS, TRAINING, CHAT):
        notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, home / "notebooks" / f"{name}.ipynb")


def html_course(home: Path) -> Path:
    """A course whose base model answers everything with HTML, and a notebook with a chat box alone."""
    tokenizer = build_tokenizer(SAID_BY_MODEL + "你好 \n")
    save_model(home / "weights" / "glm4-nano", says(SAID_BY_MODEL, tokenizer), tokenizer)
    (home / "glm4_helpers").symlink_to(ROOT / "glm4_helpers")
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CHAT_ALONE)], metadata=kernel)
    (home / "notebooks").mkdir()
    nbformat.write(notebook, home / "notebooks" / "chat.ipynb")
    return home


CHAT_ALONE = """\
import torch
from glm4_helpers import get_profile, load_base_model, load_tokenizer
from glm4_helpers.widgets import chat_box

profile = get_profile()
chat_box(load_base_model(profile, torch.float32), load_tokenizer(profile), profile)"""


def says(text: str, tokenizer):
    """A model whose layers add nothing, so that its next token depends on the last one only: it spells ``text``."""
    letters = ["<|assistant|>", "\n", *text, "<|endoftext|>"]
    assert len(set(letters)) == len(letters), "a letter that comes twice would have two successors"
    model = tiny_glm(tokenizer, hidden_size=64, num_attention_heads=4, head_dim=16)
    ids = tokenizer.convert_tokens_to_ids(letters)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.model.embed_tokens.weight[ids] = torch.eye(64)[: len(ids)]
        for last, following in itertools.pairwise(ids):
            model.lm_head.weight[following] = model.model.embed_tokens.weight[last]
    return model


@pytest.fixture(scope="module")
def courses(tmp_path_factory) -> Path:
    """The folder that JupyterLab serves: the courses that are opened lie in it."""
    return tmp_path_factory.mktemp("all courses")


@pytest.fixture(scope="module")
def course(courses) -> Path:
    """The course whose adapter is trained in the browser, by whichever notebook is run first, and then shared."""
    home = courses / "a course"
    home.mkdir()
    return course_folder(home)


@pytest.fixture(scope="module")
def trained_course(course, courses) -> Path:
    """For pictures to be committed, all data and the adapter of this clone, where it has one; else `course`."""
    if not os.environ.get("GLM4_SCREENSHOTS") or not (ROOT / "outputs" / "glm4-nano" / "adapter").is_dir():
        return course
    home = courses / "the clone"
    home.mkdir()
    for name in ("glm4_helpers", "weights", "images", "data"):
        (home / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "outputs" / "glm4-nano", home / "outputs" / "glm4-nano")
    copy_notebooks(home)
    return home


# Server and browser


@pytest.fixture(scope="module")
def lab(courses, tmp_path_factory):
    """The address of a JupyterLab that serves the courses, and the folder of its settings."""
    settings = tmp_path_factory.mktemp("jupyter")
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(settings),
        "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "user"),
        "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "IPYTHONDIR": str(settings / "ipython"),
    }
    write_setting(settings, "apputils-extension/notification", fetchNews="false", checkForUpdates=False)
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--no-browser",
        "--allow-root",
        "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={courses}",
        "--LabApp.extension_manager=readonly",
        "--ServerApp.disable_check_xsrf=True",
    ]
    log = settings / "server.log"
    with log.open("w") as stream, subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as server:
        try:
            yield wait_for_address(server, log), settings
        finally:
            server.terminate()
            server.wait(120)


def wait_for_address(server: subprocess.Popen, log: Path, seconds: float = 300) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text(encoding="utf-8"))
        if found:
            return found.group()
        time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


def write_setting(settings: Path, name: str, **values) -> None:
    file = settings / "user" / "@jupyterlab" / f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def no_browser(reason: str) -> None:
    """A failure where a browser is required, as in CI; elsewhere a skip that says why."""
    (pytest.fail if os.environ.get("GLM4_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)


def chromium() -> str:
    """The Chromium or Chrome of this machine; without one the test fails or is skipped."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    return next(found, None) or no_browser("no Chromium is installed")


@pytest.fixture(scope="module")
def browser():
    executable = chromium()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        no_browser("playwright is not installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@contextmanager
def opened(browser, address: str, notebook: Path):
    """JupyterLab with the notebook open and its kernel idle; nothing has been run yet."""
    page = browser.new_page(viewport={"width": 1150, "height": 1000})
    page.set_default_timeout(300_000)
    try:
        page.goto(f"{address}/lab/tree/{notebook.parent.parent.name}/notebooks/{notebook.name}?reset")
        # Before the kernel is there, JupyterLab would ask which one to use.
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        yield page
    except Exception:
        show_failure(page)
        raise
    finally:
        page.goto("about:blank")
        shut_down(page, address, notebook)
        page.close()


def show_failure(page) -> None:
    """What the page looked like, always in the ignored outputs/: it is no picture to be committed."""
    folder = ROOT / "outputs" / "screenshots"
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / "failure.png")


def shut_down(page, address: str, notebook: Path) -> None:
    """End the kernel of this notebook; others may be in use."""
    path = notebook.relative_to(notebook.parents[2]).as_posix()
    for session in page.request.get(f"{address}/api/sessions").json():
        if session["path"] == path:
            assert page.request.delete(f"{address}/api/sessions/{session['id']}").ok


def run_all(page) -> None:
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()


def wait_until(condition, what: str, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)


def wait_in_notebook(page, condition, what: str) -> None:
    """Wait for something that the cells do; a cell that fails ends it with the text of its error."""
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")

    def there() -> bool:
        assert not errors.count(), errors.first.text_content()
        return condition()

    wait_until(there, what, SECONDS_FOR_A_NOTEBOOK)


def wait_until_run(page) -> None:
    """Until the last code cell has its number."""
    last = page.locator(".jp-CodeCell .jp-InputPrompt").last
    wait_in_notebook(page, lambda: re.search(r"\[\d+\]", last.text_content()), "the end of the notebook")


def picture(page, name: str, locator) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    locator.scroll_into_view_if_needed()
    locator.screenshot(path=SCREENSHOTS / f"{name}.png", animations="disabled")


# The chat box as somebody sees it


def chat(page):
    return page.locator(".jp-OutputArea-output").filter(has=page.get_by_label("Message", exact=True))


def message(page):
    return chat(page).get_by_label("Message", exact=True)


def button(page, name: str):
    return chat(page).get_by_role("button", name=name, exact=True)


def status(page) -> str:
    return chat(page).get_by_role("status").inner_text()


def said(page) -> str:
    return chat(page).get_by_role("log").inner_text()


READ_ANSWERS = """box => Object.fromEntries([...box.querySelectorAll('[role=group]')].map(reply => {
  const texts = [...reply.lastElementChild.childNodes].filter(node => node.nodeType === Node.TEXT_NODE);
  return [reply.getAttribute('aria-label'), texts.map(node => node.data).join('').trimEnd()];
}))"""
"""The last answers in the box by speaker. A note after an answer, as (stopped), is no text."""

WATCH = f"""box => {{
  const answers = {READ_ANSWERS};
  const able = name => [...box.querySelectorAll('button')].some(it => it.innerText === name && !it.disabled);
  window.seen = {{}};
  window.onlyStop = false;
  const note = () => {{
    window.onlyStop ||= able('Stop') && !able('Send') && !able('Clear');
    for (const [speaker, text] of Object.entries(answers(box))) {{
      const before = window.seen[speaker] ??= [];
      if (text && text !== before.at(-1)) before.push(text);
    }}
  }};
  new MutationObserver(note).observe(box, {{subtree: true, childList: true, characterData: true, attributes: true}});
}}"""
"""Keep every state of the answers that is shown: looking from outside now and then would miss some."""


def shown_answers(page) -> dict[str, str]:
    return chat(page).evaluate(READ_ANSWERS)


def wait_until_ready(page) -> None:
    """Until all is written. Log, status and buttons change one after the other, so each of them is looked at."""
    unfinished = chat(page).get_by_role("log").get_by_text("…", exact=True)
    wait_until(
        lambda: not unfinished.count() and "Ready" in status(page) and button(page, "Stop").is_disabled(),
        "the end of the answer",
        300,
    )


def ask(page, text: str) -> None:
    message(page).fill(text)
    message(page).press("Enter")
    wait_until(lambda: text in said(page), "the question in the log")


def clear(page) -> None:
    button(page, "Clear").click()
    wait_until(lambda: "Type a message" in said(page), "the empty log")


def rerun_chat_cell(page) -> None:
    """Run the cell of the chat box again; the box is then a new and empty one."""
    cell = page.locator(".jp-CodeCell").filter(has=page.get_by_label("Message", exact=True))
    before = cell.locator(".jp-InputPrompt").text_content()
    cell.locator(".jp-InputPrompt").click()
    # By the menu: a shortcut would go to the message box where that still has the focus.
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run Selected Cell and Do not Advance").click()
    prompt = page.locator(".jp-CodeCell.jp-mod-active .jp-InputPrompt")
    wait_in_notebook(
        page, lambda: prompt.text_content() != before and re.search(r"\[\d+\]", prompt.text_content()), "the cell's end"
    )
    wait_until(lambda: chat(page).count() == 1 and "Type a message" in said(page), "the new box")


# A missing browser


def test_a_missing_browser_is_a_failure_where_it_is_required_and_else_a_skip(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("GLM4_REQUIRE_BROWSER", "1")
    with pytest.raises(pytest.fail.Exception, match="no Chromium is installed"):
        chromium()
    monkeypatch.delenv("GLM4_REQUIRE_BROWSER")
    with pytest.raises(pytest.skip.Exception, match="no Chromium is installed"):
        chromium()


# Notebooks 03 and 04


def test_training_is_seen_live_in_notebook_04(browser, lab, course):
    with opened(browser, lab[0], course / "notebooks" / f"{TRAINING}.ipynb") as page:
        run_all(page)
        cell = page.locator(".jp-CodeCell").filter(has_text="trained = train_or_load(")
        bar = cell.locator(".jp-OutputArea-output progress").first  # a second one is for evaluation
        cell.scroll_into_view_if_needed()  # JupyterLab lays out what is in view only

        def share() -> float:
            return bar.evaluate("bar => bar.value / bar.max") if bar.count() else 0.0

        wait_in_notebook(page, lambda: 0.5 < share(), "the middle of the training")
        losses = cell.locator(".jp-OutputArea-output tbody tr")
        first, begun = losses.count(), share()
        picture(page, "live_losses", cell.locator(".jp-OutputArea"))
        assert begun < 1, "the training was over before it was seen"
        wait_in_notebook(page, lambda: share() == 1, "the end of the training")
        assert losses.count() > first > 0, "the table of losses did not grow"
        wait_in_notebook(page, page.get_by_text(re.compile("s of training; kept")).count, "the cell after it")


def test_the_token_view_shows_the_row_that_is_chosen(browser, lab, course):
    with opened(browser, lab[0], course / "notebooks" / f"{TOKENS}.ipynb") as page:
        run_all(page)
        wait_until_run(page)
        row = page.get_by_label("Row", exact=True)
        tokens = page.locator(".jp-OutputArea-output").filter(has=row)
        tokens.scroll_into_view_if_needed()  # JupyterLab lays out what is in view only
        boxes = tokens.get_by_role("listitem")
        boxes.first.wait_for()
        # ipywidgets shows the spaces of an option as ones that don't break.
        follow_up = next(label for label in row.locator("option").all_text_contents() if ":\xa0follow_up:\xa0" in label)
        row.select_option(label=follow_up)
        question = follow_up.rpartition(":\xa0")[2]
        wait_until(lambda: "→ <|endoftext|>" in tokens.text_content(), "a row with several answers")
        written = "".join(box.evaluate("box => box.firstChild.textContent").strip() for box in boxes.all())
        assert question.rstrip("…") in written
        picture(page, "token_view", tokens)


# Notebook 06


@pytest.fixture(scope="module")
def run_once(browser, lab, trained_course):
    """Notebook 06 in the light theme, all cells run. It trains the adapter where 04 has not."""
    with opened(browser, lab[0], trained_course / "notebooks" / f"{CHAT}.ipynb") as page:
        run_all(page)
        wait_until_run(page)
        yield page


@pytest.fixture
def page(run_once, request):
    """Notebook 06 with a new chat box."""
    failed_before = request.session.testsfailed
    rerun_chat_cell(run_once)
    yield run_once
    if request.session.testsfailed > failed_before:
        show_failure(run_once)


def a_long_question(course: Path) -> str:
    """A question of a training row whose answer is long, so that it is seen to stream."""
    rows = json.loads((course / "data" / "train.json").read_text(encoding="utf-8"))
    return max((row for row in rows if row["kind"] == "plan"), key=lambda row: len(row["output"]))["instruction"]


def test_two_answers_stream_and_the_box_survives_stop_clear_and_rerun(page, trained_course):
    question = a_long_question(trained_course)
    chat(page).evaluate(WATCH)
    ask(page, question)
    wait_until(lambda: len(shown_answers(page)) == 2, "the second answer")
    wait_until_ready(page)
    whole = shown_answers(page)
    assert message(page).input_value() == ""
    assert [name.partition(" (")[0] for name in whole] == ["base", "fine-tuned"]
    assert len(set(whole.values())) == 2, "the adapter changes nothing"
    assert_streamed(page.evaluate("window.seen"), whole)
    assert page.evaluate("window.onlyStop"), "while an answer was written, Stop alone should have been there to click"
    clear(page)
    stop_half_way(page, question, whole)
    clear(page)
    rerun_chat_cell(page)
    chat(page).get_by_label("Longest answer").fill("60")  # the picture has room for the question and so much
    ask(page, QUESTION)
    wait_until_ready(page)
    assert QUESTION in said(page) and question not in said(page) and all(shown_answers(page).values())
    picture(page, "chat_box", chat(page))


def assert_streamed(seen: dict[str, list[str]], whole: dict[str, str]) -> None:
    assert seen.keys() == whole.keys()
    for speaker, states in seen.items():
        assert states[-1] == whole[speaker]
        assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(states))
    assert max(map(len, seen.values())) >= 4, f"no answer grew before our eyes: {seen}"


def stop_half_way(page, question: str, whole: dict[str, str]) -> None:
    """Ask the same again, which greedily gives the same, and click Stop while it is written.

    What a model says, and so how long it takes, is not up to this test: where it was quicker than the click, once more.
    """
    for _ in range(5):
        ask(page, question)
        wait_until(lambda: len("".join(shown_answers(page).values())) > 5, "some of the answer")
        # In the page itself, since a click from outside waits for a button that is just being disabled.
        button(page, "Stop").evaluate("button => button.click()")
        wait_until_ready(page)
        if "(stopped)" in said(page):
            break
        clear(page)
    assert "(stopped)" in said(page)
    stopped = shown_answers(page)
    assert all(whole[speaker].startswith(text) for speaker, text in stopped.items())
    assert len("".join(stopped.values())) < len("".join(whole.values()))


def test_what_a_user_types_is_shown_as_text(page):
    chat(page).get_by_label("Longest answer").fill("5")
    ask(page, FORGED)
    wait_until_ready(page)
    assert_no_element_was_made(page)


def assert_no_element_was_made(page) -> None:
    assert chat(page).get_by_role("log").locator("b, img").count() == 0
    assert page.title() != "owned"


@pytest.fixture(scope="module")
def box_alone(browser, lab, courses):
    """A notebook with nothing but a chat box, whose model answers everything with HTML."""
    home = courses / "says html"
    home.mkdir()
    html_course(home)
    with opened(browser, lab[0], home / "notebooks" / "chat.ipynb") as page:
        run_all(page)
        wait_until_run(page)
        yield page


def test_what_a_model_says_is_shown_as_text(box_alone):
    ask(box_alone, "你好")
    wait_until_ready(box_alone)
    assert shown_answers(box_alone) == {"base": SAID_BY_MODEL}
    assert_no_element_was_made(box_alone)


def test_lines_break_by_shift_enter_and_in_pastes_and_enter_sends(box_alone):
    page = box_alone
    message(page).focus()
    page.keyboard.type("天")
    page.keyboard.press("Shift+Enter")
    paste(page, "苹果\n\n香蕉\n")
    page.keyboard.type("人")
    time.sleep(1)
    assert message(page).input_value() == "天\n苹果\n\n香蕉\n人" and "天" not in said(page)
    page.keyboard.press("Enter")
    wait_until(lambda: "天\n苹果\n\n香蕉\n人" in said(page), "the question with its line breaks")
    wait_until(lambda: message(page).input_value() == "", "the empty box")
    wait_until_ready(page)


def paste(page, text: str) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate("text => navigator.clipboard.writeText(text)", text)
    page.keyboard.press("Control+v")


def test_the_enter_of_an_input_method_sends_nothing(box_alone):
    page = box_alone
    message(page).focus()
    keys = page.context.new_cdp_session(page)
    keys.send("Input.imeSetComposition", {"text": "ping'guo", "selectionStart": 8, "selectionEnd": 8})
    for kind in ("rawKeyDown", "keyUp"):
        keys.send(
            "Input.dispatchKeyEvent", {"type": kind, "key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 229}
        )
    keys.send("Input.insertText", {"text": "苹果汁"})
    time.sleep(1)
    assert message(page).input_value() == "苹果汁" and "苹果汁" not in said(page)
    page.keyboard.press("Enter")
    wait_until(lambda: "苹果汁" in said(page), "the question")
    wait_until_ready(page)


def test_a_text_typed_before_the_focus_went_elsewhere_is_sent_by_enter(page):
    chat(page).get_by_label("Longest answer").fill("5")
    message(page).fill("人人")
    chat(page).get_by_label("Temperature").focus()
    time.sleep(1)
    assert "人人" not in said(page), "leaving the box must not send"
    message(page).press("Enter")
    wait_until(lambda: "人人" in said(page), "the message")
    wait_until_ready(page)
    assert chat(page).get_by_role("log").get_by_text("人人", exact=True).count() == 1


def test_by_keyboard_alone_in_the_dark_theme(browser, lab, trained_course):
    address, settings = lab
    write_setting(settings, "apputils-extension/themes", theme="JupyterLab Dark")
    # A copy, since JupyterLab gives a notebook that is open twice one kernel.
    notebook = shutil.copy(
        trained_course / "notebooks" / f"{CHAT}.ipynb", trained_course / "notebooks" / "keyboard.ipynb"
    )
    with opened(browser, address, notebook) as page:
        run_all_by_keyboard(page)
        wait_until_run(page)
        go_to_chat_cell(page)
        page.keyboard.press("Control+Enter")  # a new box, without the turns that the next cell has sent
        wait_until(lambda: chat(page).count() == 1 and "Type a message" in said(page), "the new box")
        ask_with_keys(page, QUESTION)
        wait_until_ready(page)
        assert focused(page) == "Message", "the message box lost the focus"
        picture(page, "chat_box_dark", chat(page))
        # A text that is dark in the dark theme can't be read.
        red = re.search(r"\d+", chat(page).get_by_role("log").evaluate("log => getComputedStyle(log).color")).group()
        assert int(red) > 150
        stop_with_keys(page, a_long_question(trained_course))
        change_settings_with_keys(page)
        tab_to(page, "Message")
        page.keyboard.type("你好")
        tab_to(page, "Send")
        page.keyboard.press("Enter")
        wait_until(lambda: "你好" in said(page), "the question in the log")
        wait_until_ready(page)
        assert list(shown_answers(page)) == ["base"] and "(cut at the length limit)" in said(page)


def run_all_by_keyboard(page) -> None:
    page.keyboard.press("Control+Shift+C")
    in_palette = "document.activeElement.classList.contains('lm-CommandPalette-input')"
    wait_until(lambda: page.evaluate(in_palette), "the command palette")
    page.keyboard.type("Run All Cells")
    chosen = page.locator(".lm-CommandPalette-item.lm-mod-active .lm-CommandPalette-itemLabel")
    for _ in range(10):
        chosen.wait_for()
        if chosen.inner_text() == "Run All Cells":
            page.keyboard.press("Enter")
            return
        page.keyboard.press("ArrowDown")
    pytest.fail("the command palette offers no Run All Cells")


def go_to_chat_cell(page) -> None:
    """Up or down in command mode until the active cell is that of the chat box."""
    page.keyboard.press("Escape")
    active = page.locator(".jp-CodeCell.jp-mod-active").filter(has=page.get_by_label("Message", exact=True))
    for key in ["ArrowUp"] * 60 + ["ArrowDown"] * 60:
        if active.count():
            return
        page.keyboard.press(key)
    pytest.fail("the cell of the chat box can't be reached with the arrow keys")


def ask_with_keys(page, text: str) -> None:
    tab_to(page, "Message")
    page.keyboard.type(text)
    page.keyboard.press("Enter")
    wait_until(lambda: text in said(page), "the question in the log")


def stop_with_keys(page, question: str) -> None:
    """As `stop_half_way`: what is quicker than the keys is asked again."""
    for _ in range(5):
        ask_with_keys(page, question)
        tab_to(page, "Stop", or_until=lambda: "Ready" in status(page))
        if focused(page) == "Stop":
            page.keyboard.press("Enter")
        wait_until_ready(page)
        stopped = "(stopped)" in said(page)
        tab_to(page, "Clear")
        page.keyboard.press("Space")
        wait_until(lambda: "Type a message" in said(page), "the empty log")
        if stopped:
            return
    pytest.fail("no answer could be stopped")


def change_settings_with_keys(page) -> None:
    tab_to(page, "Answers")
    page.keyboard.press("End")  # the last choice: base
    tab_to(page, "Longest answer (tokens)")
    page.keyboard.press("Control+a")
    page.keyboard.type("3")


FOCUSED = """() => {
  const element = document.activeElement;
  return element.labels?.[0]?.innerText || element.innerText || '';
}"""


def focused(page) -> str:
    return page.evaluate(FOCUSED).strip()


def tab_to(page, name: str, or_until=lambda: False) -> None:
    """Press Tab, or Shift+Tab where that leads nowhere, until the control of this name has the focus."""
    for key in ("Tab", "Shift+Tab"):
        for _ in range(60):
            if focused(page) == name or or_until():
                return
            page.keyboard.press(key)
    pytest.fail(f"{name} can't be reached with the Tab key; the focus is on {focused(page)!r}")


# SwanLab's dashboard


def test_runs_are_compared_in_swanlabs_dashboard(browser, tmp_path):
    """Two trainings, tracked with --tracking local: each has its own name and curve."""
    path = python_path("swanboard")
    course_folder(tmp_path)
    variables = {"GLM4_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), path])}
    once = ["--tracking", "local", "--set", "training.epochs=1"]
    for name, settings in RUNS_COMPARED.items():
        command = ["train", "--output", str(tmp_path / "outputs" / name), *once, *settings]
        subprocess.run([sys.executable, "-m", "glm4_helpers", *command], env=os.environ | variables, check=True)
    page = browser.new_page(viewport={"width": 1200, "height": 560})
    with dashboard(tmp_path / "outputs" / "swanlog", path) as address:
        page.goto(f"{address}/charts")
        for name in RUNS_COMPARED:
            page.get_by_text(name, exact=True).first.wait_for()
        page.locator("canvas").first.wait_for()
        page.wait_for_timeout(2000)  # the curves are drawn point by point
        picture(page, "swanlab_two_runs", page.locator("body"))
    page.close()
