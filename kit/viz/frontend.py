"""Who looks at what is displayed: a person at a notebook, nobody yet, or a terminal."""

from __future__ import annotations

import sys
from typing import Any, Literal

Frontend = Literal["live", "headless", "terminal"]


def frontend() -> Frontend:
    """`live` where a front-end can draw widgets and send clicks, `headless` where a program
    executes the notebook, `terminal` without a kernel.

    A program that executes notebooks (nbclient, and with it papermill and nbconvert) cannot answer
    a kernel that asks for input, and says so in every request; front-ends with a person can.
    """
    kernel = _kernel()
    if kernel is None:
        return "terminal"
    return "live" if _request().get("content", {}).get("allow_stdin", True) else "headless"


def cell() -> str:
    """Tells the executions of cells apart; the same for all that one execution calls."""
    return str(_request().get("header", {}).get("msg_id", ""))


def let_clicks_through(*widgets: Any) -> None:
    """Have what these widgets send handled while a cell runs, where front-end and kernel can.

    JupyterLab addresses it to a thread of the kernel that runs no cells. ipykernel from 7.4 on
    redirects it to the thread that last wrote to the widget, and that runs cells: a click would
    then wait for the cell that waits for the training. So this forgets who wrote last.
    """
    for widget in widgets:
        if hasattr(widget.comm, "_reply_subshell_id"):
            del widget.comm._reply_subshell_id


def _kernel() -> Any:
    interactive = sys.modules.get("IPython")
    return getattr(interactive.get_ipython(), "kernel", None) if interactive else None


def _request() -> dict[str, Any]:
    """The message that the kernel works on. Empty where the kernel does not tell."""
    get_parent = getattr(_kernel(), "get_parent", None)
    request: dict[str, Any] = get_parent("shell") if get_parent else {}
    return request
