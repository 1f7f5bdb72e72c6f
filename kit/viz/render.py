"""`render`: the display of every kind of result.

Each display registers beside its own code:

    @render.register(UpdateReport)
    def show_update(report: UpdateReport) -> Bundle:
        return in_page(update_html(report), update_plain(report))

Whoever adds a kind of result registers a display for it in the same way, from any package.
"""

from __future__ import annotations

from functools import singledispatch

from kit.utils.display import Bundle


@singledispatch
def render(result: object) -> Bundle:
    """HTML and plain text of a result. Raises TypeError for a kind that has no display."""
    raise TypeError(f"There is no display for {type(result).__name__}.")
