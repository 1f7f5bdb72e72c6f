"""Snapshots: what can be restored, and what it holds."""

from __future__ import annotations

import time

from markupsafe import Markup

from kit.snapshots import Snapshot, Snapshots
from kit.viz.html import Child, Column, badge, join, note, table, tag, title
from kit.viz.text import columns, count, data_size, number, shorten

NONE = "No snapshots yet: session.snapshot('before') keeps this moment."


def snapshot_line(kept: Snapshot) -> str:
    """`Snapshot 'before' of step 4: 8.1 MB in host memory; session.restore('before') ...`."""
    return (
        f"Snapshot {kept.name!r} of step {kept.step:,}: {data_size(kept.bytes)} {_where(kept)}; "
        f"session.restore({kept.name!r}) comes back to it"
    )


def snapshot_line_html(kept: Snapshot) -> Markup:
    """The same in a notebook."""
    return tag("div", f"✓ {snapshot_line(kept)}")


def snapshots_html(found: Snapshots) -> Markup:
    """One row a snapshot, and what they hold together."""
    if not found:
        return note(NONE)
    heads = [
        Column("name", "fit"),
        Column("step", "num"),
        Column("weights", "num"),
        Column("reward", "num"),
        Column("taken", "fit"),
        Column("holds", "num"),
        Column("where"),
        Column("", "fit"),
    ]
    rows: list[list[Child]] = [
        [
            tag("b", kept.name),
            f"{kept.step:,}",
            f"version {kept.weight_version:,}",
            number(kept.reward, 3),
            _when(kept),
            data_size(kept.bytes),
            _where(kept),
            badge("= now", "good") if kept.weight_version == found.now else None,
        ]
        for kept in found
    ]
    words = f"{count(len(found), 'snapshot')}, the oldest first"
    return join((title(words), table(heads, rows), note(_together(found))))


def snapshots_plain(found: Snapshots) -> str:
    """The same for a terminal."""
    if not found:
        return NONE
    rows = [
        [
            kept.name,
            f"step {kept.step:,}",
            f"weights {kept.weight_version:,}",
            f"reward {number(kept.reward, 3)}",
            _when(kept),
            data_size(kept.bytes),
            _where(kept),
            "= now" if kept.weight_version == found.now else "",
        ]
        for kept in found
    ]
    return f"{columns(rows)}\n  {_together(found)}"


def _together(found: Snapshots) -> str:
    return (
        f"{data_size(found.host_bytes)} of host memory in all; session.restore(name) goes back, "
        "session.forget(name) gives the room back."
    )


def _where(kept: Snapshot) -> str:
    return f"in {shorten(str(kept.folder), 120)}" if kept.folder else "in host memory"


def _when(kept: Snapshot) -> str:
    return time.strftime("%H:%M:%S", time.localtime(kept.made))
