"""`python -m tests.screenshots [FOLDER]`: the README's pictures of the page: light, dark, narrow.

It starts a cluster, gives it six streams, and asks the question. It needs playwright and Chromium (tests/browser.py).
"""

from __future__ import annotations

import contextlib
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.cluster import cluster
from tests.browser import browser, why_not

if TYPE_CHECKING:
    from playwright.sync_api import Browser

STREAMS = 6
WARM_MS = 25_000  # of load, for a line that can be seen
STORY = b'{"model": "tiny", "prompt": "Once upon a time", "max_tokens": 300, "ignore_eos": true}'
SHOTS: dict[str, dict[str, Any]] = {
    "light": {"color_scheme": "light", "viewport": {"width": 1280, "height": 920}},
    "dark": {"color_scheme": "dark", "viewport": {"width": 1280, "height": 920}},
    "narrow": {"color_scheme": "light", "viewport": {"width": 390, "height": 920}},
}


def stream_until(ended: threading.Event, url: str) -> None:
    while not ended.is_set():
        body = urllib.request.Request(f"{url}/v1/completions", STORY, {"content-type": "application/json"})
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(body, timeout=60).read()


def shoot(chromium: Browser, url: str, folder: Path) -> None:
    pages = {name: chromium.new_page(**look) for name, look in SHOTS.items()}
    for page in pages.values():
        page.goto(url)
    for name, page in pages.items():
        page.wait_for_timeout(WARM_MS / len(pages))
        if name != "narrow":
            page.get_by_label("Message").fill("What is 47 + 85?")
            page.keyboard.press("Enter")
            page.get_by_text("47 + 85 = 132", exact=True).wait_for()
        page.evaluate("document.activeElement.blur()")
    for name, page in pages.items():
        page.screenshot(path=folder / f"page-{name}.png")


def main() -> int:
    if why := why_not():
        print(f"no pictures: {why}", file=sys.stderr)
        return 1
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs")
    folder.mkdir(parents=True, exist_ok=True)
    ended = threading.Event()
    with cluster(workers=2, shards=2, device="cpu", kv_pages=64) as one, browser() as chromium:
        streams = [threading.Thread(target=stream_until, args=(ended, one.url)) for _ in range(STREAMS)]
        for stream in streams:
            stream.start()
        try:
            shoot(chromium, f"{one.url}/", folder)
        finally:
            ended.set()
            for stream in streams:
                stream.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
