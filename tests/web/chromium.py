"""Finding and starting the Chromium that the page's tests drive."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from playwright.sync_api import BrowserContext, Playwright

__all__ = ["FLAGS", "find_chromium", "launch"]

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def find_chromium() -> str:
    """Return the path of an installed Chromium; ``MILLRACE_CHROMIUM`` names another one.

    Raises RuntimeError if there is none.
    """
    for name in (os.environ.get("MILLRACE_CHROMIUM") or "", *_NAMES):
        if name and (path := shutil.which(name)):
            return path
    raise RuntimeError(
        "no Chromium found: install the package 'chromium', or name one in MILLRACE_CHROMIUM"
    )


def launch(playwright: Playwright, profile: Path, **options: Any) -> BrowserContext:
    """Start Chromium with ``profile`` as its (fresh) user data; ``options`` as for a context."""
    return playwright.chromium.launch_persistent_context(
        profile,
        executable_path=find_chromium(),
        headless=True,
        args=list(FLAGS),
        accept_downloads=False,
        **options,
    )
