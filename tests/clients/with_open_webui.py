"""Open WebUI in front of Carousel, in a real browser: a question, its answer as it comes, and another one."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

from checks import MODEL, URL, check
from playwright.sync_api import Page, expect, sync_playwright

START_SECONDS = 150
ANSWER_MS = 60_000


def is_up(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def ask(page: Page, question: str, number: int) -> str:
    """The answer to the `number`th question of a chat, once it is there whole."""
    page.locator("#chat-input").click()
    page.keyboard.type(question)
    page.keyboard.press("Enter")
    answer = page.locator("#response-content-container").nth(number)
    expect(answer).to_contain_text(re.compile(r"\w"), timeout=ANSWER_MS)
    text, before = answer.inner_text(), ""
    while text != before:
        time.sleep(1.5)
        text, before = answer.inner_text(), text
    return text


def try_it(url: str) -> None:
    """What somebody sees who opens it."""
    with sync_playwright() as playwright:
        program = shutil.which("chromium") or shutil.which("google-chrome")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(url)
        expect(page.locator("#chat-input")).to_be_visible(timeout=ANSWER_MS)
        close = page.get_by_role("button", name=re.compile("Okay, Let's Go"))  # the news of its version
        if close.count():
            close.first.click()
        expect(page.get_by_text(MODEL).first).to_be_visible(timeout=ANSWER_MS)
        check("the model is offered", True)
        for number, question in enumerate(("Name three rivers.", "And three mountains.")):
            answer = ask(page, question, number)
            is_error = "maximum context length" in answer or "Error" in answer
            check(f"answer {number + 1} of one chat", len(answer) > 2 and not is_error, answer)
        browser.close()


with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
    free.close()
    log = Path(folder, "log")
    command = [str(Path(sys.executable).with_name("open-webui").absolute()), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    env = os.environ | {
        "DATA_DIR": folder,
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "of this test alone",
        "OPENAI_API_BASE_URL": f"{URL}/v1",
        "OPENAI_API_KEY": "none",
        "ENABLE_OLLAMA_API": "False",
        "DEFAULT_MODELS": MODEL,
        "OFFLINE_MODE": "True",  # else it looks for embeddings and news
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_ENGINE": "openai",
        "ENABLE_VERSION_UPDATE_CHECK": "False",
    }
    with log.open("wb") as output, subprocess.Popen(command, env=env, stdout=output, stderr=output) as webui:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not is_up(f"http://127.0.0.1:{port}"):
                if webui.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"failed: it did not start; saw {log.read_text()[-3000:]}")
                time.sleep(0.5)
            try_it(f"http://127.0.0.1:{port}")
        except AssertionError as error:
            raise SystemExit(f"failed: {error}; saw {log.read_text()[-3000:]}") from error
        finally:
            webui.terminate()
