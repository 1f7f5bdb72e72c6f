"""Words that tell how old a live display is, and how to go on.

What was redrawn while a kernel worked stays in the page and in the file as it was last, and looks
as if it still moved. Nothing of the page can ask the kernel, so the display itself counts: each
redraw begins the time anew after which it says that there is no news.
"""

from __future__ import annotations

import time

from markupsafe import Markup

from kit.viz.html import join, tag, with_code

ATTACH = "`from kit import RLSession; session = RLSession.attach()`"
"""What finds a session whose kernel was restarted."""
_SHEET = Markup("<style>@keyframes kit-late{to{visibility:visible;height:auto}}</style>")
_WAITS = "visibility:hidden;height:0;overflow:hidden;animation:kit-late 0s {seconds:g}s forwards"


def clock() -> str:
    """Now, as `14:03:22 on 2026-11-29`."""
    return time.strftime("%H:%M:%S on %Y-%m-%d")


def late(seconds: float, advice: str) -> Markup:
    """Line that appears once its display was not redrawn for so many seconds.

    Args:
        seconds: from being drawn; where style sheets are taken away it never appears.
        advice: how to go on, with names of code between backticks.
    """
    words = with_code(f"No news since {clock()}. {advice}")
    return join(_SHEET, tag("div", words, style=_WAITS.format(seconds=seconds), class_="kv-note"))


def picture_of(what: str, advice: str) -> Markup:
    """Line that says of a picture that nothing moves it any more.

    Args:
        what: it is a picture of, such as `the training`.
        advice: how to go on, with names of code between backticks.
    """
    words = with_code(f"Picture of {what}, taken at {clock()}. {advice}")
    return tag("div", words, class_="kv-note")
