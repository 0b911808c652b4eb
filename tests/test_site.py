"""The documentation's site: it builds, its links work, and its pages ask nobody else for anything."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from functools import partial
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    find_spec("mkdocs") is None or find_spec("material") is None or find_spec("mkdocstrings") is None,
    reason="THE SITE IS NOT TESTED: pip install '.[docs]'",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as make docs does it: a link to what is not there is an error."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser would fetch for a page without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload", "preconnect", "modulepreload"):
            self.found.append(given.get("href", ""))
        if tag not in ("a", "link"):
            self.found += [given[name] for name in ("src", "srcset", "data", "poster") if name in given]


def test_no_page_refers_to_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        parser = Fetched()
        parser.feed(page.read_text())
        assert parser.found or page.name == "answers.html", page
        assert [one for one in parser.found if re.match(r"(\w+:)?//", one)] == [], page
        # This one would fetch its script from elsewhere.
        assert 'class="mermaid"' not in page.read_text()
    for style in site.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:\w+:)?//[^\"')]*", style.read_text()) == [], style


def test_every_page_is_in_the_navigation_or_linked(site: Path) -> None:
    linked = set()
    for page in site.rglob("*.html"):
        for target in re.findall(r'href="([^"#:?]+\.html)', page.read_text()):
            linked.add((page.parent / target).resolve())
    lost = {page.relative_to(site).as_posix() for page in site.rglob("*.html") if page.resolve() not in linked}
    assert lost <= {"404.html"}


def test_the_reference_has_what_the_package_exports(site: Path) -> None:
    import aisp_local

    text = (site / "reference.html").read_text()
    names = {name for name in aisp_local.__all__ if not name.startswith("_")} - {"Message", "Prompt"}
    assert [name for name in sorted(names) if name not in text] == []


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.skipif(BROWSER is None, reason="THE SITE IS NOT TESTED IN A BROWSER: no Chromium (apt install chromium)")
def test_a_browser_finds_a_page_and_asks_nobody_else(address: str) -> None:
    sync_api = pytest.importorskip("playwright.sync_api", reason="THE SITE IS NOT TESTED IN A BROWSER: no playwright")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(
                executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
            )
            try:
                page = browser.new_page()
                page.set_default_timeout(90_000)
                asked: list[str] = []
                wrong: list[str] = []
                page.on("request", lambda request: asked.append(request.url))
                page.on("pageerror", lambda error: wrong.append(str(error)))
                page.goto(f"{address}/how.html", wait_until="networkidle")
                assert page.locator("article img").count() >= 3
                broken = "Array.from(document.querySelectorAll('article img')).filter(i => !i.naturalWidth).length"
                assert page.evaluate(broken) == 0
                page.locator("input[name=query]").press_sequentially("steering")
                page.locator(".md-search-result__link").first.wait_for(state="attached")
            finally:
                browser.close()
    assert wrong == []
    assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
