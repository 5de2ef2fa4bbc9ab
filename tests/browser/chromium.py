"""Headless Chromium on pages that scripts draw, and where the pictures of the tests are kept."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import Page, sync_playwright

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
]
DRAWN_S = 60.0
"""A busy machine may take so long to draw what a person waits a second for."""


@contextmanager
def opened(url: str, *, width: int = 1280, height: int = 900) -> Iterator[Page]:
    """A page in a browser of its own; waiting for an element fails after DRAWN_S."""
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        try:
            page = browser.new_page(viewport={"width": width, "height": height})
            page.set_default_timeout(DRAWN_S * 1000)
            page.goto(url)
            yield page
        finally:
            browser.close()


def picture(name: str, folder: Path) -> Path:
    """Where a picture goes: the folder that RLGEN_SCREENSHOTS names, or the test's own."""
    kept = Path(os.environ.get("RLGEN_SCREENSHOTS", folder))
    kept.mkdir(parents=True, exist_ok=True)
    return kept / f"{name}.png"
