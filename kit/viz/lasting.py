"""Widgets in a notebook, with a picture that stays where they cannot be.

A notebook file keeps of a widget only its number. A front-end that opens the file later finds no
widget of that number and says so, even where the same output holds HTML. So there are two outputs:
the widgets, and under them the picture. A style rule shows the picture only where the widgets are
not on the page, and where they are missing hides what the front-end says in their place.
"""

from __future__ import annotations

import uuid
from typing import Any

from markupsafe import Markup

from kit.viz.frontend import frontend
from kit.viz.html import Bundle

_RULE = (
    "<style>body:has(.kit-live-{id}) .kit-still-{id}{{display:none}}"
    ".jp-OutputArea-child:not(:has(.kit-live-{id})):has(+ .jp-OutputArea-child .kit-still-{id})"
    '{{display:none}}</style><div class="kit-still-{id}">'
)


NOTHING: Bundle = {"text/html": "", "text/plain": ""}
"""What stands where widgets are unknown, such as in an exported page."""


def show_lasting(widget: Any, picture: Bundle) -> None:
    """Display a widget where somebody can use it, and the picture that the file keeps.

    Args:
        widget: of ipywidgets; the same may be displayed again.
        picture: what is shown where no widget can be, as `bundle` makes it.
    """
    from IPython.display import display

    show: Any = display
    if frontend() != "live":
        show(picture, raw=True)
        return
    name = new_name()
    widget.add_class(f"kit-live-{name}")
    show(view(widget), raw=True)
    show(still(picture, name), raw=True)


def new_name() -> str:
    """What ties a widget of class `kit-live-NAME` to the picture that stays for it."""
    return uuid.uuid4().hex[:12]


def view(widget: Any) -> dict[str, Any]:
    """What a notebook stores of a widget."""
    number = {"model_id": widget.model_id, "version_major": 2, "version_minor": 0}
    return {**NOTHING, "application/vnd.jupyter.widget-view+json": number}


def still(picture: Bundle, name: str) -> Bundle:
    """The picture, shown only where the widget of that name is not."""
    html = Markup(_RULE.format(id=name)) + Markup(picture["text/html"]) + Markup("</div>")
    return {**picture, "text/html": str(html)}
