"""A headless Chromium, where there is one: playwright from pip, the browser from the system."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """Its path; empty where there is none. $CHROMIUM names one that is not on the PATH."""
    return os.environ.get("CHROMIUM", "") or next(filter(None, map(shutil.which, NAMES)), "")


def why_not() -> str:
    """Why no browser can be driven here; empty where one can."""
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        return "playwright is not installed: `make browser` does that, and runs these tests"
    return "" if chromium() else "there is no Chromium (on Debian: apt-get install chromium), or $CHROMIUM"


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox wants not to be root, and a user namespace; these pages are our own.
    with sync_playwright() as play:
        one = play.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield one
        one.close()
