"""The page in a real browser, against the real server and the shipped models."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_server import Server, fake, serving

from aisp_local import Aligner, shipped
from aisp_local.server import Settings
from aisp_local.trace import Trace

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(BROWSER is None, reason="THE PAGE IS NOT TESTED: no Chromium here (apt install chromium)"),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with (
        Aligner.load(threads=1, judge="judge") as aligner,
        serving(aligner, Settings(api_key=None, max_tokens=24)) as made,
    ):
        yield made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE PAGE IS NOT TESTED: no playwright here")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sync_api.sync_playwright() as playwright:
            made = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
            yield made
            made.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A page that must not write an error to its console, nor ask anybody else for anything."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    made = context.new_page()
    wrong: list[str] = []
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda message: wrong.append(message.text) if _bad(message) else None)
    made.on("request", lambda request: wrong.append(request.url) if not _ours(request.url, server) else None)
    made.set_default_timeout(60_000)
    made.goto(f"http://127.0.0.1:{server.port}/")
    yield made
    context.close()
    assert wrong == []


def _bad(message: Any) -> bool:
    """An error of the page; the browser also notes every answer that is a refusal."""
    return message.type == "error" and not re.search("status of (400|502)|ERR_FAILED", message.text)


def _ours(url: str, server: Server) -> bool:
    return url.startswith((f"http://127.0.0.1:{server.port}/", "data:", "blob:"))


def say(page: Any, text: str) -> None:
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#turns li.assistant:last-child small")


def test_a_conversation_and_its_search(page: Any, tmp_path: Path) -> None:
    assert page.inner_text("#model") == "storyteller"
    say(page, "Tell me a story about a fox.")
    answer = page.inner_text("#turns li.assistant")
    assert len(answer) > 40 and "reward" in answer
    assert "judge" in page.inner_text("#status") and "32 rollouts" in page.inner_text("#status")
    assert page.locator("#plot circle").count() == 32
    first = page.inner_text("#candidates li:first-child details")
    assert answer.split("\n")[0][:40] in first
    assert page.locator("#candidates li").count() > 3 and page.locator("#candidates mark").count() > 0
    assert "reward" in page.inner_text("#baseline") and page.inner_text("#aligned")[:40] in answer
    # The second turn knows the first.
    page.check("#blocks")
    say(page, "Tell me another one.")
    assert page.locator("#turns li").count() == 4 and page.locator("#past li").count() == 2
    # What the judge thinks of all candidates.
    assert re.search(r"rank correlation -?\d\.\d\d over 32 candidates", page.inner_text("#agreement"))
    assert page.locator("#judged circle").count() == 32
    assert "judge" in page.inner_text("#candidates li:nth-child(2) b")
    # What is exported is a trace; it opens again, also after all was forgotten.
    exported(page, tmp_path / "trace.json")
    trace = Trace.load(tmp_path / "trace.json")
    assert [m["content"] for m in trace["prompt"]][-1] == "Tell me another one." and len(trace["prompt"]) == 3
    assert len(trace["result"]["candidates"]) == 32
    assert trace["result"]["answer"] in page.locator("#turns li:last-child").text_content()
    assert str(shipped.model().parent) not in (tmp_path / "trace.json").read_text(encoding="utf-8")
    page.click("#forget")
    assert page.locator("#past li").count() == 0
    page.click("#new")
    page.set_input_files("#open", tmp_path / "trace.json")
    page.locator("#past li").wait_for()
    assert page.locator("#past li").count() == 1
    page.locator("#status", has_text="another one").wait_for()
    page.reload()
    page.click("#past button")
    page.locator("#status", has_text="another one").wait_for()


def exported(page: Any, path: Path) -> None:
    with page.expect_download() as download:
        page.click("#export")
    download.value.save_as(path)


BROKEN = {
    "[1]": "holds no trace",
    "{": "it is no JSON",
    '{"format": "aisp-local-trace", "version": 7}': "of version 7",
    '{"format": "aisp-local-trace", "version": 1, "created": "", "prompt": ""}': "broken at search",
}


def test_files_that_are_no_traces(page: Any, tmp_path: Path) -> None:
    for i, (text, said) in enumerate(BROKEN.items()):
        (tmp_path / f"{i}.json").write_text(text, encoding="utf-8")
        page.set_input_files("#open", tmp_path / f"{i}.json")
        page.locator("#error", has_text=said).wait_for()
    assert page.locator("#past li").count() == 0


def test_traces_are_dropped_and_compared(page: Any, server: Server, tmp_path: Path) -> None:
    hostile = "<img src=x onerror=alert(1)> fox"
    for name, text in (("a", "Tell me a story."), ("b", hostile)):
        result = server.aligner.generate(
            text, budget=8, n=4 if name == "a" else 8, max_tokens=12, seed=1, judge_all=True, baseline=True
        )
        server.aligner.trace(result).save(tmp_path / f"{name}.json")
        # As a browser has it when a file is dropped.
        page.evaluate(
            """text => {
                const moved = new DataTransfer();
                moved.items.add(new File([text], "trace.json", { type: "application/json" }));
                const drop = new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true });
                document.body.dispatchEvent(drop);
            }""",
            (tmp_path / f"{name}.json").read_text(encoding="utf-8"),
        )
        page.locator("#past li:first-child", has_text=text).wait_for()
    page.focus("#compare")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "compared"
    results = [Trace.load(tmp_path / f"{name}.json")["result"] for name in ("b", "a")]  # the newest is A
    assert [page.locator(f"#answer-{side}").text_content() for side in "ab"] == [found["answer"] for found in results]
    assert page.locator("#sides tbody tr:first-child td").all_inner_texts() == [
        f"{found['reward']:.2f}" for found in results
    ]
    assert (
        page.locator("#curves polyline").count() == 2
        and "run A ends at" in page.locator("#curves title").text_content()
    )
    differ = page.locator("#differ tbody tr")
    assert differ.locator("th").all_inner_texts() == ["prompt", "n", "prompt_parts"]
    assert differ.nth(1).locator("td").all_inner_texts() == ["8", "4"] and hostile in differ.nth(0).inner_text()
    assert page.locator("#search img").count() == 0
    marks = page.locator("#answer-a mark").all_inner_texts()
    assert marks == [] if results[0]["answer"] == results[1]["answer"] else marks
    # The same run twice: nothing differs.
    page.select_option("#first", "1")
    page.select_option("#second", "1")
    page.click("#compare")
    assert page.inner_text("#alike") == "Their settings are the same." and page.locator("#compared mark").count() == 0
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    # One that is opened again is no other run.
    page.set_input_files("#open", tmp_path / "a.json")
    page.locator("#past li:first-child", has_text="Tell me a story.").wait_for()
    assert page.locator("#past li").count() == 2


def test_text_of_models_is_never_markup(page: Any) -> None:
    hostile = "<img src=x onerror=alert(1)><script>document.title='taken'</script>"
    say(page, hostile)
    assert hostile in page.inner_text("#turns li.user")
    assert page.locator("#turns img, #turns script, #search img, #search script").count() == 0
    assert page.title() == "aisp-local"


def begin(page: Any, text: str) -> None:
    """A long search, until something of it is there."""
    page.select_option("#effort", "high")
    page.fill("#text", text)
    page.keyboard.press("Enter")
    page.wait_for_selector("#plot circle")


def test_stopping_keeps_the_best_so_far(page: Any, tmp_path: Path) -> None:
    begin(page, "Tell me a story about a dog.")
    assert "under way" in page.inner_text("#past li:first-child")
    page.focus("#stop")
    page.keyboard.press("Enter")
    page.wait_for_selector("#turns li.assistant small")
    assert "interrupted" in page.inner_text("#turns li.assistant small")
    assert page.is_enabled("#send") and page.is_disabled("#stop")
    # It is a run like others: exported, opened again, compared.
    exported(page, tmp_path / "trace.json")
    found = Trace.load(tmp_path / "trace.json")["result"]
    assert found["status"] == "interrupted" and 32 <= len(found["candidates"]) < 512
    assert page.locator("#turns li.assistant").text_content().startswith(found["answer"])
    page.reload()
    page.click("#past button")
    page.locator("#status", has_text="interrupted").wait_for()
    assert page.inner_text("#aligned") == found["answer"] and page.is_enabled("#export")
    page.select_option("#effort", "low")
    say(page, "Tell me a story about a dog.")
    page.click("#compare")
    differ = page.locator("#differ th").all_inner_texts()
    assert "budget" in differ and page.locator("#curves polyline").count() == 2


def test_a_second_stop_does_not_wait_for_the_server(page: Any) -> None:
    page.route("**/cancel", lambda route: None)  # never answered
    begin(page, "Tell me a story about a dog.")
    page.click("#stop")
    page.click("#stop", timeout=5000)
    page.wait_for_selector("#turns li.assistant small")
    assert "interrupted" in page.inner_text("#turns li.assistant small") and page.is_disabled("#export")


def test_a_new_conversation_has_nothing_of_the_one_under_way(page: Any) -> None:
    begin(page, "Tell me a story about a dog.")
    page.click("#new")
    page.wait_for_selector("#send:enabled")
    assert page.locator("#turns li").count() == 0 and page.input_value("#text") == ""
    page.select_option("#effort", "low")
    with page.expect_request("**/v1/chat/completions") as asked:
        say(page, "Tell me a story about a cat.")
    assert [message["content"] for message in asked.value.post_data_json["messages"]] == [
        "Tell me a story about a cat."
    ]
    assert page.locator("#turns li").count() == 2


def test_a_past_search_is_looked_at_while_another_runs(page: Any) -> None:
    say(page, "Tell me a story about a cat.")
    begin(page, "Tell me a story about a dog.")
    page.click("#past li:nth-child(2) button")
    assert "cat" in page.inner_text("#status")
    page.wait_for_timeout(1000)
    assert "cat" in page.inner_text("#status") and page.inner_text("#now") == ""
    page.click("#past li:nth-child(1) button")
    page.locator("#status", has_text="iteration").wait_for()
    page.click("#stop")
    page.locator("#status", has_text="dog").wait_for()


def test_two_tabs_know_of_each_others_searches(page: Any) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    say(other, "Tell me a story about a cat.")
    page.locator("#past li", has_text="cat").wait_for()
    say(page, "Tell me a story about a dog.")
    other.locator("#past li", has_text="dog").wait_for()
    assert page.locator("#past li").count() == other.locator("#past li").count() == 2
    other.reload()
    assert other.locator("#past li").count() == 2
    page.click("#forget")
    other.wait_for_selector("#past li", state="detached")


SEEN = """event: aisp.iteration
data: {"iteration": 1, "iterations": 4, "rollouts": 32, "budget": 128, "best": 2.0, "mean": 1.0, "best_so_far": 2.0,
data: "ess": null, "kl": null, "seconds": 3.0, "text": "Once upon a time.",
data: "candidates": [{"row": 0, "reward": 2.0, "text": "Once upon a time."}]}

"""


def test_a_server_that_dies(page: Any) -> None:
    """Before it answers, and in the middle: nothing written is lost, nor what was seen."""
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#text", "Tell me a story.")
    page.keyboard.press("Enter")
    page.locator("#error", has_text="is it still running").wait_for()
    assert page.input_value("#text") == "Tell me a story." and page.locator("#turns li").count() == 0
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(headers={"Content-Type": "text/event-stream", "X-Request-Id": "x"}, body=SEEN),
    )
    page.keyboard.press("Enter")
    page.locator("#error", has_text="is it still running").wait_for()
    assert page.locator("#turns li.assistant").text_content().startswith("Once upon a time.")
    assert "interrupted" in page.inner_text("#turns li.assistant small") and page.is_enabled("#send")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=502, body="<html>"))
    page.fill("#text", "Tell me another.")
    page.keyboard.press("Enter")
    page.locator("#error", has_text="status 502").wait_for()


def test_a_server_that_wants_a_key_is_given_one(browser: Any) -> None:
    with fake(api_key="secret") as server:
        page = browser.new_page()
        asked: list[str] = []
        page.on(
            "dialog", lambda dialog: (asked.append(dialog.message), dialog.accept(["wrong", "secret"][len(asked) - 1]))
        )
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.fill("#text", "abc")
        page.keyboard.press("Enter")
        page.locator("#error", has_text="the API key is missing or wrong").wait_for()
        page.keyboard.press("Enter")
        page.wait_for_selector("#turns li.assistant small")
        assert page.inner_text("#error") == "" and asked == ["API key"] * 2
        page.locator("#model", has_text="fake").wait_for()
        page.close()


def test_a_run_that_is_too_large_to_be_kept_costs_no_other(page: Any, server: Server, tmp_path: Path) -> None:
    trace = server.aligner.trace(server.aligner.generate("Tell me a story.", budget=2, n=2, max_tokens=4))
    trace.save(tmp_path / "small.json")
    large = json.loads((tmp_path / "small.json").read_text(encoding="utf-8"))
    large["prompt"] = "a long one " * 200_000
    (tmp_path / "large.json").write_text(json.dumps(large | {"created": "2026-01-01T00:00:00+00:00"}), encoding="utf-8")
    for name, prompt in (("small", "Tell me"), ("large", "a long one")):
        page.set_input_files("#open", tmp_path / f"{name}.json")
        page.locator("#past li:first-child", has_text=prompt).wait_for()
    assert page.locator("#past li").count() == 2
    page.reload()
    assert page.locator("#past li").all_inner_texts()[0].startswith("Tell me") and page.locator("#past li").count() == 1


def test_what_something_else_left_in_the_browser(page: Any) -> None:
    page.evaluate("""localStorage.setItem("aisp-local.runs", '[null, 1, {"prompt": 2}, {"trace": {}}]')""")
    page.reload()
    say(page, "Tell me a story.")
    assert page.locator("#past li").count() == 1


def test_a_keyboard_and_a_small_dark_screen_are_enough(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth <= 360")
    assert page.evaluate("document.activeElement.id") == "text"
    for expected in ("effort", "strength", "blocks", "send"):
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == expected
    unnamed = page.evaluate(
        "[...document.querySelectorAll('input, select, textarea, button')]"
        ".filter(e => !(e.labels?.length || e.textContent.trim())).map(e => e.id)"
    )
    assert unnamed == []


def test_a_server_that_refuses_is_heard(page: Any, server: Server) -> None:
    page.fill("#text", "a fox " * 2000)
    page.keyboard.press("Enter")
    page.locator("#error", has_text="shorten it").wait_for()
    assert page.input_value("#text").startswith("a fox")  # nothing written is lost
