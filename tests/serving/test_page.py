"""The page at /, in a real browser."""

import os
import re
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from running_server import until, write_adapter

PAGE = Path(__file__).resolve().parents[2] / "launcher" / "serving" / "page"
KEY = "a-key-of-24-characters-x"
needs_browser = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
ANSWERS = "[...document.querySelectorAll('.message:not(.user) > span')].map((each) => each.textContent)"


@pytest.fixture
def browser(tmp_path):
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


def choose(browser, name):
    browser.run(f"document.querySelector('#models input[value=\"{name}\"]').click()")


def look(browser, name):
    """Writes pictures for inspection to LOLDU_TEST_PICTURES=DIR."""
    if folder := os.environ.get("LOLDU_TEST_PICTURES"):
        browser.look(f"{folder}/{name}-light.png")
        browser.look(f"{folder}/{name}-dark.png", scheme="dark")
        browser.look(f"{folder}/{name}-phone.png", width=400, height=800)


@needs_browser
@pytest.mark.slow
def test_the_page_compares_the_streamed_answers_of_two_models(start, browser):
    server = start("pirate", "poet")
    browser.open(server.url)
    browser.until("document.querySelectorAll('#models li').length === 3")

    choose(browser, "poet")  # pirate is selected automatically
    browser.run("document.getElementById('question').focus()")
    browser.type("ahoy <b>you</b>")
    browser.press_enter()
    browser.until(f"{ANSWERS}.length === 2 && !document.querySelector('.waiting')")

    assert browser.run(ANSWERS) == [f"{name}: u: ahoy <b>you</b>\na: " for name in ("pirate", "poet")]
    assert browser.run("document.querySelector('.messages b')") is None  # shown as text, never as HTML
    assert re.search(r"\d+ tokens in \d+\.\d s", browser.text())
    look(browser, "compare")
    assert browser.complaints() == []


@needs_browser
@pytest.mark.slow
def test_the_page_stops_an_answer_shows_errors_and_finds_new_adapters(start, browser):
    server = start("pirate")
    server.engine.hold_at = 3
    browser.open(server.url)
    browser.until("document.querySelectorAll('#models li').length === 2")
    browser.run("document.getElementById('question').value = 'ahoy'; document.getElementById('send').click()")
    browser.until(f"{ANSWERS}.join() === 'pir'")

    browser.run("document.getElementById('stop').click()")
    until(lambda: not server.engine.requests)
    write_adapter(server.folder / "poet")
    server.catalogue.load("poet")
    browser.run("loadModels()")
    browser.until("document.querySelectorAll('#models li').length === 3")
    browser.run("document.getElementById('max-tokens').value = 5000")
    browser.run("document.getElementById('question').value = 'more'; document.getElementById('send').click()")
    browser.until("document.querySelector('.message.error')")

    assert "stopped" in browser.text()
    assert "max_tokens 5,000 is more than this server allows" in browser.text()
    look(browser, "error")


@needs_browser
@pytest.mark.slow
def test_the_page_asks_for_the_key(start, browser):
    server = start("pirate", keys=(KEY,))
    browser.open(server.url)
    browser.until("!document.getElementById('key-form').hidden")
    look(browser, "key")

    browser.run(f"document.getElementById('key').value = '{KEY}'; document.querySelector('#key-form button').click()")

    browser.until("document.querySelectorAll('#models li').length === 2")
    assert browser.run("document.getElementById('key-form').hidden")
    assert KEY not in browser.run("JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])")


def test_the_page_loads_nothing_from_elsewhere_and_runs_no_script_of_others(start):
    response = start().client.get("/")

    assert "default-src 'none'" in response.headers["content-security-policy"]
    assert "unsafe-inline" not in response.headers["content-security-policy"]
    sources = "".join(file.read_text() for file in PAGE.iterdir())
    assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", sources)
    assert not re.search(r"<script(?! src)|<style|\son\w+=", (PAGE / "page.html").read_text())
