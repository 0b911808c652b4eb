"""The report of a trace: a page that needs nothing else, in which texts are text."""

from __future__ import annotations

import base64
import copy
import hashlib
import re
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from test_page import ARGUMENTS, BROWSER

from aisp_local import Aligner
from aisp_local.cli.main import main
from aisp_local.report import marked, report
from aisp_local.report_plots import agreement
from aisp_local.trace import Trace

pytestmark = pytest.mark.native

HOSTILE = "<script>alert('taken')</script><img src=x onerror=alert(1)>&amp;</title>"
VOID = {"meta", "line", "circle", "rect", "polyline", "link", "br"}


class Page(HTMLParser):
    """Tags that are open, all that there were, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href", "style") for name, _ in attributes)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.fixture(scope="module")
def trace() -> Iterator[Trace]:
    with Aligner.load(threads=1, reward="kind-and-safe", judge="judge") as aligner:
        asked: dict[str, Any] = {"budget": 8, "n": 4, "max_tokens": 16, "judge_all": True, "baseline": True}
        yield aligner.trace(aligner.chat([{"role": "user", "content": HOSTILE}], **asked))


def changed(trace: Trace, **result: Any) -> Trace:
    content = copy.deepcopy(dict(trace.content))
    content["result"] |= result
    return Trace(content)


def test_the_command_writes_a_page(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "fox.json")
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "fox.json")])
    assert done.exit_code == 0 and "fox.html" in done.stderr and done.stdout == ""
    text = (tmp_path / "fox.html").read_text(encoding="utf-8")
    page = Page(text)
    assert "script" not in page.tags and "img" not in page.tags and HOSTILE in page.text
    found = trace["result"]
    assert all(candidate["text"] in page.text for candidate in found["candidates"])
    assert f"{found['reward']:.2f}" in page.text and trace["model"]["fingerprint"] in page.text
    assert re.search(r"rank correlation -?\d\.\d\d over 8 candidates", page.text)
    assert re.search(r"\d of 8 are above the unaligned answer", page.text)
    # Rewards, ranks, each part of the reward, the judge, KL and times.
    parts = len(found["candidates"][0]["parts"])
    assert parts > 1 and page.tags.count("svg") == 5 + parts
    assert page.tags.count("circle") == 8 * (2 + parts) + 9
    done = CliRunner().invoke(main, ["explain", str(tmp_path / "fox.json"), "-o", str(tmp_path / "fox.json")])
    assert done.exit_code == 2 and "is the trace itself" in done.stderr


def test_the_policy_allows_its_own_styles_only(trace: Trace) -> None:
    text = report(trace)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    styles = {
        base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
        for style in re.findall("<style>(.*?)</style>", text, re.DOTALL)
    }
    assert styles == set(re.findall("'sha256-([^']*)'", policy))
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text


@pytest.mark.skipif(BROWSER is None, reason="THE REPORT IS NOT SHOWN: no Chromium here (apt install chromium)")
def test_a_browser_shows_it_without_a_complaint(trace: Trace, tmp_path: Path) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE REPORT IS NOT SHOWN: no playwright here")
    (tmp_path / "page.html").write_text(report(trace), encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=ARGUMENTS)
            page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme="dark")
            said: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            page.goto((tmp_path / "page.html").as_uri())
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 28)"
            assert page.evaluate("getComputedStyle(document.querySelector('.paper')).fill") == "rgb(27, 29, 33)"
            assert page.evaluate("document.documentElement.scrollWidth <= 360")
            browser.close()
    assert said == []


EXTREME = [None, 0.0, 1e300, -1e300, 1e-300, 5.0, 1e12, 1e12 + 1e-4]


def test_whatever_a_trace_may_hold(trace: Trace, tmp_path: Path) -> None:
    candidates = [
        candidate | {"reward": value, "judge": EXTREME[-i - 1], "parts": {}, "kl": value}
        for i, (candidate, value) in enumerate(zip(trace["result"]["candidates"], EXTREME, strict=True))
    ]
    for candidate in ([candidates[0]], candidates, candidates[-2:], [candidates[0] | {"text": ""}]):
        nothing = dict.fromkeys(("best", "mean", "std", "best_so_far", "kl", "ess"))
        iterations = [trace["result"]["iterations"][0] | nothing]
        extreme = changed(trace, candidates=candidate, iterations=iterations, baseline=None, judge=None)
        extreme.save(tmp_path / "extreme.json")
        page = Page(report(Trace.load(tmp_path / "extreme.json")))
        assert "without alignment" not in page.text
    plain = Trace({**trace.content, "prompt": "Once <b>"})
    assert "Once <b>" in Page(report(plain)).text


def test_words_that_another_text_does_not_have_are_marked() -> None:
    assert marked("a red fox ran", "a fox ran") == "a <mark>red</mark> fox ran"
    assert marked("same\n text", "same\n text") == "same\n text"
    assert marked("<b> x", "y") == "<mark>&lt;b&gt;</mark> <mark>x</mark>" and marked("", "a") == ""
    long = "word " * 5000
    assert marked(long, long) == long


def test_whether_the_judge_agrees() -> None:
    up = [(float(i), float(i * i)) for i in range(9)]
    assert agreement(up) == "The judge ranks candidates as the reward does: rank correlation 1.00 over 9 candidates"
    assert "disagrees: rank correlation -1.00" in agreement([(x, -y) for x, y in up])
    assert "does not agree: rank correlation 0.00" in agreement([(0, 0), (1, 1), (2, 0)])
    assert agreement([(1, 0), (1, 1)]) == "The judge, or the reward, thinks the same of all candidates"
