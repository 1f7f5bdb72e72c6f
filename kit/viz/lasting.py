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
    name = uuid.uuid4().hex[:12]
    widget.add_class(f"kit-live-{name}")
    view = {"model_id": widget.model_id, "version_major": 2, "version_minor": 0}
    # The empty words stand where widgets are unknown, such as in an exported page.
    nothing = {"text/html": "", "text/plain": ""}
    show(nothing | {"application/vnd.jupyter.widget-view+json": view}, raw=True)
    still = Markup(_RULE.format(id=name)) + Markup(picture["text/html"]) + Markup("</div>")
    show({**picture, "text/html": str(still)}, raw=True)
