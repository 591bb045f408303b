"""The notebooks in a real browser: JupyterLab serves them, Chromium opens them, and somebody chats."""

from __future__ import annotations

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
from conftest import ROOT
from tiny_models import save_model, tiny_glm, tiny_tokenizer, write_only

pytestmark = [pytest.mark.slow, pytest.mark.browser]

NOTEBOOK = ROOT / "notebooks" / "05_before_after_comparison.ipynb"
SCREENSHOTS = Path(os.environ.get("GLM4_SCREENSHOTS") or ROOT / "outputs" / "screenshots")
"""`make notebooks` sets the variable and so refreshes the committed pictures; else they go to the ignored outputs/."""

CHROMIUM_OPTIONS = [
    "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync",
]  # fmt: skip
FORGED = "<b>粗体</b><img src=x onerror=\"document.title='owned'\">"


# What is opened


def small_course(home: Path) -> Path:
    """A course folder of a random model that writes on and on, two adapters of it, and a notebook with all widgets."""
    tokenizer = tiny_tokenizer()
    model = write_only(tiny_glm(tokenizer), tokenizer, "你好苹果香蕉天地人")
    save_model(home / "weights" / "glm4-nano", model, tokenizer)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(cell) for cell in SMALL_NOTEBOOK]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    path = home / "notebooks" / "small.ipynb"
    path.parent.mkdir(parents=True)
    nbformat.write(notebook, path)
    return path


def whole_course(home: Path) -> Path:
    """Notebook 05 in a course folder with the shipped model and few rows, so that training takes seconds."""
    from test_notebooks import write_few_rows

    for name in ("glm4_helpers", "weights"):
        (home / name).symlink_to(ROOT / name)
    write_few_rows(home / "data")
    path = home / "notebooks" / NOTEBOOK.name
    path.parent.mkdir()
    return shutil.copy(NOTEBOOK, path)


SMALL_NOTEBOOK = (
    """\
import torch
from peft import LoraConfig, get_peft_model
from glm4_helpers import get_profile, home, load_base_model, load_tokenizer
from glm4_helpers.models import save_adapter_facts
from glm4_helpers.callbacks import NotebookPlot
from glm4_helpers.widgets import chat_box, token_view

profile = get_profile()
tokenizer = load_tokenizer(profile)
base = load_base_model(profile, torch.float32)""",
    """\
adapters = {}
for name in ("checkpoint 1", "checkpoint 2"):
    settings = LoraConfig(r=8, lora_alpha=16, target_modules=list(profile.lora.target_modules), init_lora_weights=False)
    tuned = get_peft_model(base, settings)
    adapters[name] = home() / "outputs" / name
    tuned.save_pretrained(adapters[name])
    save_adapter_facts(adapters[name], profile)
    base = tuned.unload()""",
    """\
rows = [
    {"kind": "word", "instruction": "苹果的英文是什么？", "input": "", "output": "苹果的英文是apple。"},
    {"kind": "sum", "instruction": "1+2等于多少？", "input": "", "output": "3。", "history": [["你好！", "你好！"]]},
]
token_view(tokenizer, rows)""",
    """\
from datasets import Dataset
from glm4_helpers import encode
from glm4_helpers.datasets import to_messages
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

run = SFTConfig(
    output_dir=str(home() / "outputs" / "run"), max_steps=60, logging_steps=1, learning_rate=3e-3, report_to="none",
    per_device_train_batch_size=2, disable_tqdm=True, save_strategy="no", bf16=False,
)
encoded = Dataset.from_list([encode(tokenizer, to_messages(row)) for row in rows])
trainer = SFTTrainer(
    load_base_model(profile, torch.float32), run, processing_class=tokenizer, train_dataset=encoded,
    callbacks=[NotebookPlot()],
)
trainer.remove_callback(PrinterCallback)
_ = trainer.train()""",
    """\
box = chat_box(base, tokenizer, profile, adapters)
box""",
)


@pytest.fixture(scope="module")
def notebook(tmp_path_factory) -> Path:
    """The notebook to open, in a course folder of its own."""
    return small_course(tmp_path_factory.mktemp("a course"))  # or: whole_course, once 05 and the weights are there


# Server and browser


@pytest.fixture(scope="module")
def lab(notebook, tmp_path_factory):
    """The address of a JupyterLab that serves the course folder, and the folder of its settings."""
    home, settings = notebook.parent.parent, tmp_path_factory.mktemp("jupyter")
    environment = {
        **os.environ, "GLM4_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
        "JUPYTER_CONFIG_DIR": str(settings), "JUPYTER_RUNTIME_DIR": str(settings / "runtime"),
        "JUPYTERLAB_SETTINGS_DIR": str(settings / "user"), "JUPYTERLAB_WORKSPACES_DIR": str(settings / "workspaces"),
        "IPYTHONDIR": str(settings / "ipython"),
    }  # fmt: skip
    write_setting(settings, "apputils-extension/notification", fetchNews="false", checkForUpdates=False)
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1",
        "--ServerApp.port=0", "--IdentityProvider.token=", f"--ServerApp.root_dir={home}",
        "--LabApp.extension_manager=readonly", "--ServerApp.disable_check_xsrf=True",
    ]  # fmt: skip
    log = settings / "server.log"
    with log.open("w") as stream, subprocess.Popen(command, env=environment, stdout=stream, stderr=stream) as server:
        try:
            yield wait_for_address(server, log), settings
        finally:
            server.terminate()
            server.wait(30)


def wait_for_address(server: subprocess.Popen, log: Path, seconds: float = 120) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and server.poll() is None:
        found = re.search(r"http://127\.0\.0\.1:[1-9]\d*", log.read_text())
        if found:
            return found.group()
        time.sleep(0.3)
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


def write_setting(settings: Path, name: str, **values) -> None:
    file = settings / "user" / "@jupyterlab" / f"{name}.jupyterlab-settings"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(values))


def no_browser(reason: str) -> None:
    """A failure where a browser is required, as in CI; elsewhere a skip that says why."""
    (pytest.fail if os.environ.get("GLM4_REQUIRE_BROWSER") == "1" else pytest.skip)(reason)


@pytest.fixture(scope="module")
def browser():
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        no_browser("playwright is not installed")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        no_browser("no Chromium is installed")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, lab, notebook):
    """JupyterLab with the notebook open in a new kernel, all cells run."""
    with opened(browser, lab[0], notebook) as page:
        yield page


@contextmanager
def opened(browser, address: str, notebook: Path):
    page = browser.new_page(viewport={"width": 1150, "height": 1000})
    page.set_default_timeout(60_000)
    try:
        page.goto(f"{address}/lab/tree/notebooks/{notebook.name}?reset")
        # Before the kernel is there, JupyterLab would ask which one to use.
        page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for()
        run_all(page)
        yield page
    except Exception:
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=SCREENSHOTS / "failure.png")
        raise
    finally:
        page.goto("about:blank")
        shut_down_kernels(page, address)
        page.close()


def run_all(page, seconds: float = 300) -> None:
    """Run > Run All Cells; waits for the chat box, and fails at once with the text of an error."""
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    errors = page.locator("[data-mime-type='application/vnd.jupyter.error']")
    wait_until(lambda: errors.count() or chat(page).count(), "the chat box", seconds)
    assert not errors.count(), errors.first.inner_text()
    chat(page).wait_for()


def shut_down_kernels(page, address: str) -> None:
    for kernel in page.request.get(f"{address}/api/kernels").json():
        assert page.request.delete(f"{address}/api/kernels/{kernel['id']}").ok


# The chat box as somebody sees it


def chat(page):
    return page.locator(".jp-OutputArea-output").filter(has=page.get_by_label("Message", exact=True))


def button(page, name: str):
    return chat(page).get_by_role("button", name=name, exact=True)


def said(page) -> str:
    return chat(page).get_by_role("log").inner_text()


def wait_until(condition, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never came: {what}"
        time.sleep(0.05)


def wait_until_ready(page) -> None:
    wait_until(
        lambda: "Ready" in chat(page).get_by_role("status").inner_text() and button(page, "Stop").is_disabled(),
        "the end of the answer",
    )


def picture(page, name: str, locator) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    locator.scroll_into_view_if_needed()
    locator.screenshot(path=SCREENSHOTS / f"{name}.png")


# What somebody does


def test_two_answers_stream_and_the_box_survives_stop_clear_and_rerun(page):
    message = chat(page).get_by_label("Message", exact=True)
    chat(page).get_by_label("Longest answer").fill("1000")
    message.fill("你好，苹果的英文是什么？")
    message.press("Enter")
    wait_until(lambda: "is answering" in chat(page).get_by_role("status").inner_text(), "the beginning of an answer")
    wait_until(lambda: button(page, "Send").is_disabled() and button(page, "Clear").is_disabled(), "disabled buttons")
    lengths = set()
    wait_until(lambda: lengths.add(len(said(page))) or "fine-tuned (checkpoint 2)" in said(page), "the second answer")
    assert len(lengths) >= 4, "the first answer did not stream"
    button(page, "Stop").click()
    wait_until_ready(page)
    assert message.input_value() == ""
    text = said(page)
    assert "你好，苹果的英文是什么？" in text and "base" in text and "fine-tuned (checkpoint 2)" in text
    picture(page, "chat_box", chat(page))
    stop_half_way(page)
    button(page, "Clear").click()
    wait_until(lambda: "苹果的英文" not in said(page), "the empty log")
    rerun_chat_cell(page)
    assert chat(page).count() == 1, "the box of the former run is still there"
    message = chat(page).get_by_label("Message", exact=True)
    message.fill("再见")
    button(page, "Send").click()
    wait_until(lambda: "fine-tuned" in said(page), "the second answer")
    button(page, "Stop").click()
    wait_until_ready(page)
    assert "再见" in said(page)


def stop_half_way(page) -> None:
    chat(page).get_by_label("Longest answer").fill("2000")
    chat(page).get_by_label("Message", exact=True).fill("写长一点")
    chat(page).get_by_label("Message", exact=True).press("Enter")
    wait_until(lambda: "is answering" in chat(page).get_by_role("status").inner_text(), "the long answer")
    before = len(said(page))
    wait_until(lambda: len(said(page)) > before + 5, "some of the long answer")
    button(page, "Stop").click()
    wait_until_ready(page)
    assert "(stopped)" in said(page)


def rerun_chat_cell(page) -> None:
    cell = page.locator(".jp-CodeCell").filter(has=page.get_by_label("Message", exact=True))
    cell.locator(".jp-InputPrompt").click()
    page.keyboard.press("Control+Enter")
    wait_until(lambda: chat(page).count() == 1 and "Type a message" in said(page), "the new box")


def test_by_keyboard_alone(page):
    # Command mode, last cell: from here on no mouse.
    page.locator(".jp-CodeCell").last.locator(".jp-InputPrompt").click()
    tab_to(page, "Message")
    page.keyboard.type("天地人")
    page.keyboard.press("Enter")
    wait_until(lambda: "is answering" in chat(page).get_by_role("status").inner_text(), "the answer")
    assert focused(page) == "Message", "the message box lost the focus"
    tab_to(page, "Stop")
    page.keyboard.press("Enter")
    wait_until_ready(page)
    assert "(stopped)" in said(page)
    tab_to(page, "Clear")
    page.keyboard.press("Space")
    wait_until(lambda: "天地人" not in said(page), "the empty log")
    tab_to(page, "Answers")
    page.keyboard.press("End")  # the last choice: base
    tab_to(page, "Longest answer")
    page.keyboard.press("Control+a")
    page.keyboard.type("12")
    tab_to(page, "Message")
    page.keyboard.type("你好")
    page.keyboard.press("Enter")
    wait_until(lambda: "base" in said(page), "an answer of the base model")
    wait_until_ready(page)
    assert "fine-tuned" not in said(page) and "(cut at the length limit)" in said(page)


FOCUSED = """() => {
  const element = document.activeElement;
  return element.labels?.[0]?.innerText || element.innerText || '';
}"""


def focused(page) -> str:
    return page.evaluate(FOCUSED).strip()


def tab_to(page, name: str) -> None:
    """Press Tab, or Shift+Tab where that leads nowhere, until the control of this name has the focus."""
    for key in ("Tab", "Shift+Tab"):
        for _ in range(25):
            if focused(page) == name:
                return
            page.keyboard.press(key)
    pytest.fail(f"{name} can't be reached with the Tab key; the focus is on {focused(page)!r}")


def test_what_a_user_types_is_shown_as_text(page):
    chat(page).get_by_label("Longest answer").fill("5")
    message = chat(page).get_by_label("Message", exact=True)
    message.fill(FORGED)
    message.press("Enter")
    wait_until(lambda: "粗体" in said(page), "the message")
    wait_until_ready(page)
    assert FORGED in said(page)
    assert chat(page).get_by_role("log").locator("b, img").count() == 0
    assert page.title() != "owned"


def test_a_text_typed_before_the_focus_went_elsewhere_is_sent_by_enter(page):
    message = chat(page).get_by_label("Message", exact=True)
    chat(page).get_by_label("Longest answer").fill("5")
    message.fill("人人")
    chat(page).get_by_label("Temperature").focus()
    time.sleep(1)
    assert "人人" not in said(page), "leaving the box must not send"
    message.press("Enter")
    wait_until(lambda: "人人" in said(page), "the message")
    wait_until_ready(page)
    assert said(page).count("人人") == 1


@pytest.mark.parametrize("theme", ["JupyterLab Light", "JupyterLab Dark"])
def test_pictures_in_light_and_dark(browser, lab, notebook, theme):
    address, settings = lab
    write_setting(settings, "apputils-extension/themes", theme=theme)
    name = theme.split()[1].lower()
    with opened(browser, address, notebook) as page:
        chat(page).get_by_label("Longest answer").fill("40")
        chat(page).get_by_label("Message", exact=True).fill("苹果的英文是什么？")
        chat(page).get_by_label("Message", exact=True).press("Enter")
        wait_until(lambda: "苹果的英文" in said(page), "the message")
        wait_until_ready(page)
        picture(page, f"chat_box_{name}", chat(page))
        tokens = page.locator(".jp-OutputArea-output").filter(has=page.get_by_label("Row", exact=True))
        tokens.get_by_label("Row", exact=True).select_option(index=1)
        tokens.scroll_into_view_if_needed()  # JupyterLab lays out what is in view only
        wait_until(lambda: "→ <|endoftext|>" in tokens.text_content(), "the row with two answers")
        picture(page, f"token_view_{name}", tokens)
        plot = page.locator(".jp-OutputArea-output img").first
        picture(page, f"live_plot_{name}", plot)
        assert plot.bounding_box()["width"] > 300
        # A text that is dark in the dark theme, or light in the light one, can't be read.
        red = int(re.search(r"\d+", chat(page).get_by_role("log").evaluate("e => getComputedStyle(e).color")).group())
        assert red > 150 if name == "dark" else red < 100
