"""Debian's Chromium, driven by Playwright: one browser for a module of tests, pages that note what they load and log.

`apt-get install chromium` provides it. Tests that need it are skipped with that sentence where it is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
MISSING = "needs the browser Chromium: apt-get install chromium"
LIMIT_MS = 30_000.0


@dataclass
class Visit:
    """An open page, with what it loaded (but `data:`), logged and failed at."""

    page: Any
    loaded: list[str] = field(default_factory=list)
    logged: list[str] = field(default_factory=list)


@contextmanager
def browser() -> Iterator[Any]:
    """The browser; skips the test without one."""
    if CHROMIUM is None:
        pytest.skip(MISSING)
    from playwright.sync_api import sync_playwright

    # Chromium's own sandbox does not work as root or in containers without user namespaces. The pages are ours.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@contextmanager
def visit(browser: Any, url: str, *, theme: str = "light", width: int = 1200) -> Iterator[Visit]:
    """An open page. `theme`: light or dark. `width`: of the window, in CSS pixels."""
    context = browser.new_context(color_scheme=theme, viewport={"width": width, "height": 900})
    context.set_default_timeout(LIMIT_MS)
    found = Visit(context.new_page())
    found.page.on("request", lambda request: request.url.startswith("data:") or found.loaded.append(request.url))
    found.page.on("console", lambda message: found.logged.append(f"{message.type}: {message.text}"))
    found.page.on("pageerror", lambda error: found.logged.append(f"error: {error}"))
    found.page.goto(url)
    yield found
    context.close()


def address(path: Path) -> str:
    return path.absolute().as_uri()
