"""The chat page in a real browser: Debian's Chromium, without a window, driven by Playwright."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.filterwarnings("default::ResourceWarning")  # of Playwright's own child process

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no chromium on PATH: apt-get install chromium; the page was not tested")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the page was not tested")
    with sync.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


class Tab:
    """A page with what it complained about and asked for."""

    def __init__(self, browser: Any, url: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)
        self.page.wait_for_selector("#examples button")

    def say(self, text: str, *, tokens: int = 20) -> None:
        self.page.evaluate("tokens => { document.getElementById('max_tokens').value = tokens }", tokens)
        self.page.fill("#message", text)
        self.page.keyboard.press("Enter")

    def never_end(self) -> None:
        """Forbid the end token, so that an answer is as long as it may be."""

        def forbid(route: Any) -> None:
            route.continue_(post_data=json.dumps({**route.request.post_data_json, "logit_bias": {"257": -100}}))

        self.page.route("**/completions", forbid)

    def press(self, button: str) -> str:
        """Press a button that asks the server, and wait for the answer."""
        with self.page.expect_response("**/completions"):
            self.page.click(button)
        return self.answered()

    def answered(self) -> str:
        self.page.wait_for_selector("#actions:not([hidden])", timeout=60_000)
        return str(self.page.locator("#talk li.assistant").last.inner_text())


@pytest.fixture
def tab(browser: Any, chatting: Any) -> Iterator[Tab]:
    opened = Tab(browser, chatting.url)
    yield opened
    assert opened.complaints == []
    assert all(url.startswith((chatting.url, "data:")) for url in opened.asked)
    opened.context.close()


@pytest.fixture
def base_tab(browser: Any, base: Any) -> Iterator[Tab]:
    opened = Tab(browser, base.url)
    yield opened
    assert opened.complaints == []
    opened.context.close()


def test_a_message_is_answered_and_regenerated(tab: Tab) -> None:
    tab.say("Hello")
    first = tab.answered()
    assert tab.page.locator("#talk li").count() == 2
    second = tab.press("#again")
    assert tab.page.locator("#talk li").count() == 2
    assert first != second
    assert "a second" in tab.page.inner_text("#measured")
    assert " of 2048" in tab.page.text_content("#used")


def test_stop_ends_the_answer_and_keeps_what_is_there(tab: Tab, chatting: Any) -> None:
    tab.never_end()
    tab.say("Hello", tokens=1900)
    tab.page.wait_for_selector("#talk .token")
    tab.page.locator("#stop").dispatch_event("click")  # at once: a tiny model is done before a pointer has moved
    assert tab.answered()
    chatting.wait_until(lambda: chatting.metric("active_slots") == 0, 1)
    tab.say("Again", tokens=1900)
    tab.page.wait_for_selector("#stop:not([hidden])")
    tab.page.keyboard.press("Escape")
    tab.page.wait_for_selector("#send:not([hidden])")


def test_what_the_model_or_a_person_writes_is_never_html(tab: Tab) -> None:
    evil = "<img src=x onerror='document.title=\"owned\"'><script>document.title='owned'</script><b>bold</b>"
    events = [
        {
            "choices": [
                {
                    "index": 0,
                    "delta": {"content": evil},
                    "finish_reason": None,
                    "logprobs": {
                        "content": [
                            {
                                "token": evil,
                                "logprob": -1,
                                "bytes": [],
                                "top_logprobs": [{"token": evil, "logprob": -1, "bytes": []}],
                            }
                        ]
                    },
                }
            ]
        },
    ]
    stream = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(body=stream, content_type="text/event-stream"))
    tab.say(evil)
    assert tab.answered() == evil
    tab.page.locator("#talk .token").first.hover()
    assert evil.replace(" ", "·") in tab.page.inner_text("#alternatives")
    assert tab.page.locator("main img, main b, main script, #alternatives img").count() == 0
    tab.page.reload()
    tab.page.wait_for_selector("#talk li")
    assert tab.page.locator("main img, main b, main script").count() == 0
    assert "owned" not in tab.page.title()


def test_pointing_at_a_word_tells_what_else_was_considered(tab: Tab) -> None:
    tab.never_end()
    tab.say("Hello")
    tab.answered()
    tab.page.locator("#talk .token").nth(2).hover()
    rows = tab.page.locator("#alternatives div")
    assert rows.count() >= 5
    assert tab.page.locator("#alternatives .chosen").count() >= 1
    assert "%" in rows.first.inner_text()
    tab.page.locator("#talk .user").first.hover()
    assert not tab.page.locator("#alternatives").is_visible()


def test_the_keyboard_alone_is_enough(tab: Tab) -> None:
    keyboard = tab.page.keyboard
    assert tab.page.evaluate("document.activeElement.id") == "message"
    keyboard.type("Hello")
    keyboard.press("Shift+Enter")
    keyboard.type("there")
    keyboard.press("Enter")
    tab.answered()
    assert tab.page.locator("#talk .user").inner_text() == "Hello\nthere"
    tab.page.evaluate("document.querySelector('#talk .assistant .text').focus()")
    keyboard.press("ArrowRight")
    assert tab.page.locator("#alternatives").is_visible()
    first = tab.page.locator(".token.here").evaluate("element => [...element.parentNode.children].indexOf(element)")
    keyboard.press("ArrowRight")
    second = tab.page.locator(".token.here").evaluate("element => [...element.parentNode.children].indexOf(element)")
    assert second > first
    keyboard.press("Escape")
    assert not tab.page.locator("#alternatives").is_visible()
    seen = set()
    tab.page.evaluate("document.body.focus(); document.activeElement.blur()")
    for _ in range(30):
        keyboard.press("Tab")
        seen.add(tab.page.evaluate("document.activeElement.id"))
    assert {"new", "theme", "again", "copy", "message", "send", "system", "temperature", "seed", "tint"} <= seen


def test_the_conversation_and_the_settings_outlive_a_reload(tab: Tab) -> None:
    tab.page.fill("#system", "Be kind.")
    tab.page.fill("#seed", "7")
    tab.say("Hello")
    text = tab.answered()
    tab.page.reload()
    tab.page.wait_for_selector("#talk li.assistant")
    assert tab.page.locator("#talk li.assistant").inner_text() == text
    assert tab.page.input_value("#system") == "Be kind."
    assert tab.page.input_value("#seed") == "7"
    assert tab.press("#again") == text  # the same seed
    tab.page.click("#new")
    tab.page.reload()
    tab.page.wait_for_selector("#examples button")
    assert tab.page.locator("#talk li").count() == 0


def test_a_conversation_longer_than_the_context_goes_on(tab: Tab) -> None:
    for _ in range(4):
        tab.say("x" * 700, tokens=30)
        assert tab.answered()
        assert tab.page.inner_text("#notice") == ""


def test_the_system_prompt_and_the_controls_are_sent(tab: Tab) -> None:
    sent: list[Any] = []
    tab.page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    tab.page.fill("#system", "Be kind.")
    tab.page.fill("#top_k", "5")
    tab.say("Hello", tokens=3)
    tab.answered()
    assert sent[0]["messages"][0] == {"role": "system", "content": "Be kind."}
    assert (sent[0]["temperature"], sent[0]["top_p"], sent[0]["top_k"], sent[0]["max_tokens"]) == (0.8, 0.95, 5, 3)
    assert "seed" not in sent[0]


def test_a_base_model_continues_the_text_and_says_so(base_tab: Tab) -> None:
    page = base_tab.page
    assert "was not tuned to answer" in page.inner_text("#welcome-text")
    assert page.is_disabled("#system")
    base_tab.say("Once upon", tokens=10)
    base_tab.answered()
    before = page.inner_text("#talk")
    base_tab.press("#send")  # an empty box asks for more
    assert page.inner_text("#talk").startswith("Once upon")
    assert len(page.inner_text("#talk")) > len(before)


def test_the_shape_has_a_row_for_each_layer(tab: Tab) -> None:
    assert tab.page.locator("#shape tbody tr").count() == 2
    assert ":" in tab.page.locator("#shape tbody td").first.inner_text()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_themes_and_the_switch(browser: Any, chatting: Any, scheme: Any) -> None:
    opened = Tab(browser, chatting.url, color_scheme=scheme)
    page = opened.page

    def darkness() -> int:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(int(part) for part in colour.strip("rgb()").split(","))

    assert (darkness() < 200) == (scheme == "dark")
    page.click("#theme")
    assert (darkness() < 200) == (scheme == "light")
    page.reload()
    assert (darkness() < 200) == (scheme == "light")
    opened.context.close()


def test_a_phone_shows_all_of_it(browser: Any, chatting: Any) -> None:
    opened = Tab(browser, chatting.url, viewport={"width": 360, "height": 640}, has_touch=True)
    page = opened.page
    opened.say("Hello", tokens=200)
    opened.answered()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    for name in ("#send", "#message", "#open-panel"):
        box = page.locator(name).bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360 and box["y"] + box["height"] <= 640
    page.click("#open-panel")
    assert page.locator("#temperature").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#temperature").is_visible()
    opened.context.close()


def test_a_key_is_asked_for_by_the_browser(browser: Any, start: Any, folder: Any) -> None:
    key = "a-key-of-enough-characters"
    locked = start(folder, keys=[key])
    context = browser.new_context(http_credentials={"username": "me", "password": key})
    page = context.new_page()
    page.goto(locked.url)
    page.wait_for_selector("#examples button")
    page.fill("#message", "Once")
    page.keyboard.press("Enter")
    page.wait_for_selector("#actions:not([hidden])", timeout=60_000)
    context.close()
    context = browser.new_context()
    assert context.request.get(locked.url).status == 401
    context.close()


def test_a_server_that_is_gone_is_told(browser: Any, start: Any, folder: Any) -> None:
    server = start(folder)
    opened = Tab(browser, server.url)
    server.process.kill()
    server.process.wait()
    opened.say("Hello")
    opened.page.wait_for_selector("#notice:has-text('does not answer')")
    assert opened.page.locator("#send").is_visible()
    opened.context.close()
