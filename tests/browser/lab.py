"""JupyterLab as a person meets it: a server of its own, and a page in a browser that drives it."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import nbformat
from nbformat.sign import NotebookNotary
from playwright.sync_api import Browser, Locator, Page

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # What a display would fetch is seen as a request, and goes nowhere.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
SETTINGS = {
    "apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
    # Every cell is in the page, whether one can see it or not.
    "notebook-extension/tracker": {"windowingMode": "none"},
}

WIDGETS_WITHOUT_KERNEL = "@jupyter-widgets/jupyterlab-manager"
"""Complains of each notebook that is opened without a kernel, whatever is in it."""

_DONE = """() => {
    const cells = panel.content.model.sharedModel.cells.filter(
        cell => cell.cell_type === 'code' && cell.source.trim());
    const failed = cell => cell.outputs.some(output => output.output_type === 'error')
        && !cell.metadata.tags?.includes('raises-exception');
    return panel.sessionContext.session?.kernel?.status === 'idle'
        && cells.every(cell => cell.executionState !== 'running')
        && (cells.every(cell => cell.execution_count) || cells.some(failed));
}"""


class Server:
    """One JupyterLab on this machine only, behind a token, with settings of its own."""

    def __init__(self, folder: Path) -> None:
        self.notebooks = folder / "notebooks"
        self.data = folder / "data"
        self.token = secrets.token_hex(16)
        self.log = folder / "server.log"
        settings = folder / "settings" / "@jupyterlab"
        for name, values in SETTINGS.items():
            file = settings / f"{name}.jupyterlab-settings"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(values))
        self.notebooks.mkdir()
        self.data.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        command = [
            sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root",
            "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.port}",
            "--ServerApp.port_retries=0", f"--ServerApp.root_dir={self.notebooks}",
            f"--IdentityProvider.token={self.token}", "--LabApp.expose_app_in_browser=True",
            "--LabApp.extension_manager=readonly",
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=self._environment(folder)
            )

    def _environment(self, folder: Path) -> dict[str, str]:
        """The user's own, but for everything that Jupyter and IPython keep in a home directory."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JUPYTER", "KIT_RUN"))}
        caches = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
        return kept | {
            "HOME": str(folder),
            "XDG_CACHE_HOME": caches,  # holds no settings, and matplotlib takes long to fill it
            "IPYTHONDIR": str(folder / "ipython"),
            "JUPYTER_CONFIG_DIR": str(folder / "config"),
            "JUPYTER_DATA_DIR": str(self.data),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
            "PYTHONPATH": str(ROOT),
        }

    def wait(self) -> None:
        """Until it answers."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                with urllib.request.urlopen(f"{self.url}/api?token={self.token}", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, self.log.read_text()
                assert time.monotonic() < deadline, self.log.read_text()
                time.sleep(0.2)

    def put(self, name: str, notebook: nbformat.NotebookNode, *, trusted: bool = True) -> str:
        """Save a notebook where the server finds it; trusted ones count as run by this user."""
        if trusted:
            NotebookNotary(data_dir=str(self.data)).sign(notebook)
        nbformat.write(notebook, self.notebooks / name)
        return name

    def close(self) -> None:
        """End the server; it ends its kernels."""
        self.process.terminate()
        self.process.wait(300)


@dataclass
class Watch:
    """What a page did that no display may do."""

    requests: list[str] = field(default_factory=list)
    """Addresses off this machine."""
    dialogs: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    """What the page wrote on the console as an error."""

    def on(self, page: Page) -> None:
        page.on("request", lambda request: self._request(request.url))
        page.on("websocket", lambda socket: self._request(socket.url))
        page.on("dialog", lambda dialog: (self.dialogs.append(dialog.message), dialog.dismiss()))
        page.on("pageerror", lambda error: self._error(f"{error}\n{error.stack}"))
        page.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)

    def _request(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("data", "blob", "file") and parts.hostname != "127.0.0.1":
            self.requests.append(url)

    def _error(self, words: str) -> None:
        if WIDGETS_WITHOUT_KERNEL not in words:
            self.errors.append(words)

    def clear(self) -> None:
        """Forget what was seen so far."""
        for seen in (self.requests, self.dialogs, self.errors):
            seen.clear()

    @property
    def nothing(self) -> bool:
        return not (self.requests or self.dialogs or self.errors)


class Lab:
    """A JupyterLab window with one notebook in it."""

    def __init__(self, server: Server, browser: Browser) -> None:
        self.server = server
        self.watch = Watch()
        self.page = browser.new_page(viewport={"width": 1280, "height": 900})
        self.page.set_default_timeout(60_000)
        self.watch.on(self.page)
        self.page.goto(f"{server.url}/lab?reset&token={server.token}")
        self.page.wait_for_function("() => window.jupyterapp")
        self.page.evaluate(
            """async () => {
                await jupyterapp.restored;
                await jupyterapp.commands.execute('application:set-mode',
                                                  {mode: 'single-document'});
                jupyterapp.shell.collapseLeft();
            }"""
        )

    def open(self, name: str, *, theme: str = "Light", kernel: bool = True) -> None:
        """Open a notebook of the server's folder alone, with its kernel or without any."""
        self.watch.clear()
        preference = {} if kernel else {"shouldStart": False, "canStart": False}
        self.page.evaluate(
            """async ([path, theme, kernelPreference]) => {
                const { commands } = jupyterapp;
                await commands.execute('apputils:change-theme', {theme});
                window.panel?.dispose();
                window.panel = await commands.execute('docmanager:open',
                    {path, factory: 'Notebook', kernelPreference});
                await panel.context.ready;
                await panel.revealed;
                jupyterapp.shell.activateById(panel.id);
            }""",
            [name, f"JupyterLab {theme}", preference],
        )
        light = "true" if theme == "Light" else "false"
        self.page.wait_for_selector(f'body[data-jp-theme-light="{light}"]', state="attached")
        if kernel:
            self.page.evaluate("panel.sessionContext.ready")

    def menu(self, *names: str) -> None:
        """Click through the menu bar, and confirm if JupyterLab asks."""
        self.page.locator(".lm-MenuBar-item", has_text=names[0]).first.click()
        for name in names[1:]:
            self.page.locator(".lm-Menu-item", has_text=name).first.click()

    def run_all(self, seconds: float | None = None) -> None:
        """Run > Run All Cells; wait so many seconds at most until all are done, or not at all."""
        self.menu("Run", "Run All Cells")
        if seconds is not None:
            self.wait_until_done(seconds)

    def wait_until_done(self, seconds: float) -> None:
        """Until every code cell has run, or one has failed that was not meant to."""
        self.page.wait_for_function(_DONE, timeout=1000 * seconds)

    def run_cell(self, place: int) -> None:
        """Select a cell, and Run > Run Selected Cell; does not wait."""
        self.page.evaluate("place => { panel.content.activeCellIndex = place; }", place)
        self.menu("Run", "Run Selected Cell")

    def wait_for_words(
        self, place: int, words: str, seconds: float, other_than: str = "\0"
    ) -> None:
        """Until a cell's outputs hold these words, and not those of before."""
        self.page.wait_for_function(
            """([place, words, old]) => {
                const cell = panel.content.model.sharedModel.cells[place];
                const shown = JSON.stringify(cell.outputs);
                return shown.includes(words) && !shown.includes(old);
            }""",
            arg=[place, words, other_than],
            timeout=1000 * seconds,
        )

    def confirm(self) -> None:
        """Say yes to what JupyterLab asks."""
        self.page.locator(".jp-Dialog button.jp-mod-accept").click()

    def restart_kernel(self) -> None:
        """Kernel > Restart Kernel…, and wait until it is there again."""
        self.page.evaluate(
            """() => {
                window.restarted = false;
                panel.sessionContext.statusChanged.connect((_, status) => {
                    window.restarted ||= ['starting', 'restarting'].includes(status);
                });
            }"""
        )
        self.menu("Kernel", "Restart Kernel…")
        self.confirm()
        self.page.wait_for_function(
            "() => window.restarted && panel.sessionContext.session?.kernel?.status === 'idle'"
        )

    def save_and_shut_down(self) -> None:
        """File > Save Notebook, then Kernel > Shut Down Kernel."""
        self.menu("File", "Save Notebook")
        self.page.wait_for_function("() => !panel.context.model.dirty")
        self.menu("Kernel", "Shut Down Kernel")
        self.page.wait_for_function("() => !panel.sessionContext.session?.kernel")

    def notebook(self) -> nbformat.NotebookNode:
        """The notebook as it is in the window, saved or not."""
        text = self.page.evaluate("JSON.stringify(panel.content.model.toJSON())")
        return nbformat.reads(text, as_version=4)

    def outputs(self) -> Locator:
        """The output area of each cell that has one."""
        return self.page.locator(".jp-OutputArea-output")

    def close(self) -> None:
        self.page.close()


def errors_of(notebook: nbformat.NotebookNode) -> list[str]:
    """Every error that a cell ended with, as it is shown."""
    outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
    return ["\n".join(o.traceback) for o in outputs if o.output_type == "error"]


def shown_notebook(bundles: Sequence[dict[str, Any]]) -> nbformat.NotebookNode:
    """An executed notebook with a cell for each display."""
    v4 = nbformat.v4
    cells = []
    for place, data in enumerate(bundles, start=1):
        output = v4.new_output("execute_result", data, execution_count=place)
        cells.append(v4.new_code_cell(f"display_{place}", execution_count=place, outputs=[output]))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})
