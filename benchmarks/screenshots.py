"""Pictures of the page for docs/server.md: a search under way, its end in light and dark, two compared, a phone.

    pip install playwright        (and a Chromium: apt install chromium)
    python benchmarks/screenshots.py [--out docs] [--threads 1]

The real server with the shipped models answers one prompt at medium effort, judged by the shipped judge.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from aisp_local import Aligner
from aisp_local.server import Server, Settings, make_app

PROMPT = "Tell me a story about a fox."


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs"))
    parser.add_argument("--threads", type=int)
    asked = parser.parse_args(arguments)
    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser_path is None:
        sys.exit("there is no Chromium; install one (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with Aligner.load(threads=asked.threads, judge="judge") as aligner:
        server = Server(make_app(aligner, Settings(max_tokens=160)))
        thread = threading.Thread(target=server.run)
        thread.start()
        while not server.started:
            time.sleep(0.05)
        port = server.addresses[0][1]
        try:
            with sync_playwright() as playwright:
                arguments_ = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
                browser = playwright.chromium.launch(executable_path=browser_path, args=arguments_)
                page = browser.new_page(viewport={"width": 1200, "height": 760}, color_scheme="light")
                page.goto(f"http://127.0.0.1:{port}/")
                page.select_option("#effort", "medium")
                page.fill("#text", PROMPT)
                page.keyboard.press("Enter")
                page.locator("#plot polyline").first.wait_for(timeout=1_200_000)
                page.locator("#status", has_text="iteration 3").wait_for(timeout=1_200_000)
                page.screenshot(path=asked.out / "page-search.png")
                page.locator("#turns li.assistant small").wait_for(timeout=1_200_000)
                page.screenshot(path=asked.out / "page-light.png")
                page.emulate_media(color_scheme="dark")
                page.screenshot(path=asked.out / "page-dark.png")
                page.emulate_media(color_scheme="light")
                page.select_option("#effort", "low")
                page.fill("#text", "Tell me another one.")
                page.keyboard.press("Enter")
                page.locator("#turns li.assistant").nth(1).locator("small").wait_for(timeout=1_200_000)
                page.click("#compare")
                page.wait_for_timeout(1000)  # until all has scrolled
                page.screenshot(path=asked.out / "page-compare.png")
                page.emulate_media(color_scheme="dark")
                page.set_viewport_size({"width": 390, "height": 844})
                page.evaluate("document.querySelector('#turns').lastChild.scrollIntoView({ block: 'end' })")
                page.wait_for_timeout(1000)
                page.evaluate("window.scrollTo(0, 0)")
                page.screenshot(path=asked.out / "page-phone.png")
                browser.close()
        finally:
            server.should_exit = True
            thread.join()


if __name__ == "__main__":
    main()
