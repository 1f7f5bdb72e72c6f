"""One JupyterLab for all tests in a browser, and Debian's chromium to look at it with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from kit.runs.page import write_page
from tests.browser.lab import CHROMIUM_FLAGS, Lab, Server, Watch

expect.set_options(timeout=60_000)  # milliseconds; five seconds are few on a busy machine


@pytest.fixture(scope="session")
def chromium() -> str:
    """Where the browser is. Without one these tests are skipped, unless KIT_BROWSER is set."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        words = (
            "these tests open JupyterLab in a browser, and this machine has no chromium; to run "
            "them, install it (Debian: apt-get install chromium)"
        )
        if os.environ.get("KIT_BROWSER"):
            pytest.fail(words)
        pytest.skip(words)
    return path


@pytest.fixture(scope="session")
def server(chromium: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(tmp_path_factory.mktemp("lab"))
    try:
        running.wait()
        yield running
    finally:
        running.close()


# For one module only: while Playwright runs, asyncio.run refuses to, and others need that.
@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[Browser]:
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(
            executable_path=chromium, headless=True, args=list(CHROMIUM_FLAGS)
        )
        yield running
        running.close()


@pytest.fixture(scope="module")
def lab(server: Server, browser: Browser) -> Iterator[Lab]:
    window = Lab(server, browser)
    yield window
    window.close()


OpenPage = Callable[..., tuple[Page, Watch]]


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[OpenPage]:
    """Opens a notebook as the HTML page that a run leaves of it."""
    contexts = []

    def opened(notebook: nbformat.NotebookNode, *, scripts: bool = True) -> tuple[Page, Watch]:
        path = tmp_path / f"page-{len(contexts)}.ipynb"
        nbformat.write(notebook, path)
        context = browser.new_context(
            java_script_enabled=scripts, viewport={"width": 1280, "height": 900}
        )
        contexts.append(context)
        page, watch = context.new_page(), Watch()
        watch.on(page)
        page.goto(write_page(path).as_uri())
        return page, watch

    yield opened
    for context in contexts:
        context.close()
