"""What came of a run, for the top of its page."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.viz.html import Child, Column, badge, facts, fold, note, page, table, tag, title
from kit.viz.text import count, duration, number, percent, shorten

if TYPE_CHECKING:
    from kit.runs.result import RunRecord

_BADGES = {
    "completed": ("✓ completed", "good"),
    "failed": ("✗ failed", "bad"),
    "interrupted": ("‖ interrupted", "warn"),
    "running": ("▶ running", "warn"),
}
_PACKAGES = ("kit", "sglang", "torch", "transformers", "ray", "python")


def run_summary(record: RunRecord) -> str:
    """HTML: status, headline figures and parameters; machine and versions folded."""
    name = Path(record.notebook).stem
    return page(
        title(f"{shorten(name, 80)} ", badge(*_BADGES[record.status])),
        facts(_figures(record)),
        note(_given(record.given)),
        fold("Where it ran, and with what", _circumstances(record)),
    )


def run_title(record: RunRecord) -> str:
    """For a browser's tab."""
    return f"{Path(record.notebook).stem}, {_when(record.started)}"


def _figures(record: RunRecord) -> list[tuple[str, str]]:
    head, found = record.headline, list[tuple[str, str]]()
    if head.get("steps"):
        found.append(("steps", f"{head['steps']:,}"))
    if head.get("reward_first") is not None:
        ends = [number(head[name], 3) for name in ("reward_first", "reward_last")]
        found.append(("reward, first and last step", " → ".join(ends)))
    before, after = (head.get(f"accuracy_{when}") for when in ("before", "after"))
    if before is not None:
        moved = percent(before) if after is None else f"{percent(before)} → {percent(after)}"
        found.append((f"right on {shorten(str(head.get('dataset')), 40)}, held out", moved))
    found.append(("took", duration(record.seconds)))
    if record.seed is not None:
        found.append(("seed", str(record.seed)))
    return found


def _given(given: Mapping[str, Any]) -> str:
    if not given:
        return "All parameters are the notebook's own."
    told = ", ".join(f"{name} = {shorten(str(value), 80)}" for name, value in given.items())
    return f"Given: {told}."


def _circumstances(record: RunRecord) -> Child:
    machine = record.machine
    rows: list[list[Child]] = [["started", _when(record.started)]]
    if machine.get("cores"):
        words = [count(int(machine["cores"]), "core"), f"{machine.get('memory_gib')} GiB"]
        gpus = [str(gpu) for gpu in machine.get("gpus") or ()] or ["no GPU"]
        rows.append(["machine", shorten(", ".join([*words, *gpus]), 200)])
    known = {**{name: None for name in _PACKAGES}, **record.versions}
    told = [f"{name} {version}" for name, version in known.items() if version]
    rows.append(["versions", ", ".join(told)])
    if record.git_commit:
        rows.append(["git commit", tag("span", record.git_commit, class_="kv-text")])
    if attempts := record.lineage.attempts:
        ends = ", ".join(attempt.status for attempt in attempts)
        rows.append(["attempts before", f"{len(attempts)} ({ends})"])
    return table([Column("", "fit"), Column("")], rows)


def _when(started: str) -> str:
    try:
        return f"{datetime.fromisoformat(started):%d %B %Y, %H:%M %Z}".strip()
    except ValueError:
        return started
