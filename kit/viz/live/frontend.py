"""Which front-end displays, and widgets with a picture that stays where no widget can be shown.

A notebook file keeps of a widget only its number. A front-end that opens the file later finds no
widget of that number and says so, even where the same output holds HTML. So there are two outputs:
the widgets, and under them the picture. A style rule shows the picture only where the widgets are
not on the page, and where they are missing hides what the front-end says in their place.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Mapping
from typing import Any, Literal

from markupsafe import Markup

from kit.utils.display import Bundle
from kit.viz.html import part

Frontend = Literal["live", "headless", "terminal"]


def frontend() -> Frontend:
    """Which front-end shows what is displayed here.

    `live` can draw widgets and send clicks, `headless` is a program that executes the notebook, and
    `terminal` is none: there is no kernel.

    A program that executes notebooks (nbclient, and with it papermill and nbconvert) cannot answer
    a kernel that asks for input, and says so in every request; front-ends with a person can.
    """
    kernel = _kernel()
    if kernel is None:
        return "terminal"
    return "live" if _request().get("content", {}).get("allow_stdin", True) else "headless"


def cell() -> str:
    """An id of the cell execution under way, shared by everything that it calls."""
    return str(_request().get("header", {}).get("msg_id", ""))


def let_clicks_through(*widgets: Any) -> None:
    """Handle clicks on these widgets while a cell runs, if front-end and kernel can.

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


_RULE = (
    "<style>body:has({live}) .kit-still-{id}{{display:none}}"
    ".jp-OutputArea-child:not(:has({live})):has(+ .jp-OutputArea-child .kit-still-{id})"
    '{{display:none}}</style><div class="kit-still-{id}">'
)
_LIVE = ".kit-live-{id}:not(.jupyter-widgets-disconnected)"
"""Widgets on the page; after a restart of the kernel they are only wreckage."""
NO_WORDS = Markup("")
NOTHING: Bundle = {"text/html": "", "text/plain": ""}
"""What stands where widgets are unknown, such as in an exported page."""


def show_data(data: Mapping[str, Any], display_id: str | None = None, update: bool = False) -> None:
    """Display what a notebook stores, or redraw all that is displayed under an id."""
    from IPython.display import display, update_display

    show: Any = update_display if update else display
    show(data, raw=True, display_id=display_id)


def show_lasting(widget: Any, picture: Bundle, note: Markup) -> None:
    """Display a widget where somebody can use it, and the picture that the file keeps.

    Args:
        widget: of ipywidgets; the same may be displayed again.
        picture: what is shown where no widget can be, as `bundle` makes it.
        note: what the file says over the picture of a widget that somebody could use.
    """
    if frontend() != "live":
        show_data(picture)
        return
    name = new_name()
    widget.add_class(f"kit-live-{name}")
    show_data(view(widget))
    show_data(still(picture, name, note))


def new_name() -> str:
    """New name that links a widget of class `kit-live-NAME` to its saved picture."""
    return uuid.uuid4().hex[:12]


def view(widget: Any) -> dict[str, Any]:
    """What a notebook stores of a widget."""
    number = {"model_id": widget.model_id, "version_major": 2, "version_minor": 0}
    return {**NOTHING, "application/vnd.jupyter.widget-view+json": number}


def still(picture: Bundle, name: str, note: Markup = NO_WORDS) -> Bundle:
    """Picture that is shown only where the widget of that name is not, under a note."""
    rule = _RULE.format(id=name, live=_LIVE.format(id=name))
    head = part(note) if note else ""
    html = Markup(rule) + Markup(head) + Markup(picture["text/html"]) + Markup("</div>")
    return {**picture, "text/html": str(html)}
