"""The table: each row beside one device, and all of it as Markdown; from the results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.device_parts.results import Results, RowResult
from benchmarks.device_parts.rows import FAULTS, SWEEP, WAYS
from kit.utils.formatting import count

NONE = "–"
DIGITS = 4
"""Of the norm of the first gradient, in which all rows have to agree."""
GRADIENT = "train/grad_norm"
DIFFERS = "NO"
PHASES = {
    "generation": ("generation_s", "new_tokens"),
    "update": ("update_s", "tokens"),
    "step": ("step_s", "new_tokens"),
}
"""Seconds, and the tokens that are handled in them: responses, or prompts and responses."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over a row's steps."""

    seconds: float
    rate: float
    """Tokens a second; 0 where no tokens are counted."""


def speed(measured: dict[str, Any], phase: str) -> Speed | None:
    """Of a phase; None where no step was made."""
    seconds, tokens = PHASES[phase]
    steps = measured.get("steps") or []
    if not steps:
        return None
    return Speed(
        statistics.median(step[seconds] for step in steps),
        statistics.median(step[tokens] / step[seconds] for step in steps),
    )


def sync_seconds(measured: dict[str, Any]) -> float | None:
    """Median of the steps' syncs."""
    steps = measured.get("steps") or []
    return statistics.median(step["sync_s"] for step in steps) if steps else None


def share(rate: float, one: float, devices: int) -> float:
    """Of `devices` times the tokens a second of one device: 1 is all that more devices can give."""
    return rate / (devices * one)


def same_digits(value: float, expected: float, digits: int = DIGITS) -> bool:
    """Whether two numbers are the same in so many digits, but for one unit of the last one."""
    if value == expected:
        return True
    if not (math.isfinite(value) and math.isfinite(expected)) or not expected:
        return False
    unit = 10.0 ** (math.floor(math.log10(abs(expected))) - digits + 1)
    return abs(value - expected) <= unit * (1 + 1e-9)


def one_device(results: Results, shape: str) -> RowResult | None:
    """The row of one device that others are compared with."""
    rows = (each for each in results.rows if each.row.shape == shape and each.row.way == WAYS[0])
    return next((each for each in rows if each.row.devices == 1 and each.measured), None)


# ---- rows as text ------------------------------------------------------------------------------

SPEEDS = (
    "way", "devices", "generation tok/s", "s", "of N x one", "update tok/s", "s", "of N x one",
    "step tok/s", "s", "of N x one", "sync s", "times one", "state",
)  # fmt: skip
LEARNING = (
    "way", "devices", "first gradient", "as one device", "log-prob difference",
    "weights after a sync", "GiB of a device, used of planned", "start s", "whole row s",
)  # fmt: skip


def speeds(result: RowResult, one: RowResult | None) -> list[str]:
    """Cells of `SPEEDS`."""
    cells = [name(result), str(result.row.devices)]
    for phase in PHASES:
        found = speed(result.measured, phase)
        base = speed(one.measured, phase) if one else None
        cells += [number(found.rate), number(found.seconds)] if found else [NONE, NONE]
        if found and base and base.rate:
            cells.append(f"{100 * share(found.rate, base.rate, result.row.devices):.0f}%")
        else:
            cells.append(NONE)
    sync, first = sync_seconds(result.measured), sync_seconds(one.measured) if one else None
    cells.append(number(sync))
    cells.append(f"{sync / first:.1f} x" if sync and first else NONE)
    return [*cells, state(result)]


def learning(result: RowResult, one: RowResult | None) -> list[str]:
    """Cells of `LEARNING`."""
    measured = result.measured
    found = _first(result).get(GRADIENT)
    verified, mismatch = measured.get("verified"), measured.get("mismatch")
    gib = measured.get("gib") or {}
    return [
        name(result),
        str(result.row.devices),
        NONE if found is None else f"{found:.{DIGITS}g}",
        as_one(result, one),
        f"{mismatch['mean_abs_diff']:.2g} ({mismatch['verdict']})" if mismatch else NONE,
        checked(verified) if verified else NONE,
        f"{gib['peak']:.1f} of {gib['planned']:.1f}" if gib else NONE,
        number(measured.get("start_s")),
        number(result.seconds or None),
    ]


def as_one(result: RowResult, one: RowResult | None) -> str:
    """Whether the first gradient has the norm that it has on one device, of the same samples."""
    if result is one:
        return "it is"
    if one is None or not (GRADIENT in _first(one) and GRADIENT in _first(result)):
        return NONE
    if result.measured["batch"] != one.measured["batch"]:
        return "other samples"
    expected = _first(one)[GRADIENT]
    alike = same_digits(_first(result)[GRADIENT], expected)
    return "yes" if alike else f"{DIFFERS}: {expected:.{DIGITS}g}"


def _first(result: RowResult) -> dict[str, float]:
    """Metrics of the first update."""
    found: dict[str, float] = result.measured.get("first_update", {})
    return found


def checked(verified: dict[str, Any]) -> str:
    """What a verified sync has shown."""
    if verified["compared"]:
        return f"{verified['parameters']} checksums equal"
    return f"{verified['parameters']} erased and written"


def name(result: RowResult) -> str:
    """The way, marked where other rows ran beside it."""
    return result.row.in_words + (" *" if result.beside else "")


def state(result: RowResult) -> str:
    """How it ended, and after how many steps."""
    steps = len(result.measured.get("steps") or [])
    return f"{result.state}, {count(steps, 'step')}" if steps else result.state


def number(value: float | None) -> str:
    """Three digits that count, or all in front of the point."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


# ---- what has to hold --------------------------------------------------------------------------


def wrong(results: Results) -> list[str]:
    """What has to hold and does not, and rows that failed; a sentence each."""
    found = []
    for each in results.rows:
        key, measured = each.row.key, each.measured
        one = one_device(results, each.row.shape)
        if each.state == "failed":
            found.append(f"{key} failed: {first_line(each.why)}")
        if (said := as_one(each, one)).startswith(DIFFERS):
            found.append(f"{key}: its first gradient is not that of one device ({said}).")
        if measured.get("mismatch", {}).get("verdict") == "fail":
            found.append(f"{key}: trainer and engine disagree.")
        if (killed := measured.get("killed")) and killed["ranks_left"]:
            found.append(f"{key}: {killed['ranks_left']} ranks were left after one died.")
        if killed and not killed["names_a_way_out"]:
            found.append(
                f"{key}: the error does not name a way out: {first_line(killed['message'])}"
            )
        if (held := measured.get("held_out")) and not held["same"]:
            found.append(f"{key}: the loaded checkpoint has other log-probs.")
        weights = measured.get("weights", {"equal": 0, "of": 0})
        if weights["equal"] != weights["of"]:
            found.append(f"{key}: {weights['of'] - weights['equal']} weights were loaded wrongly.")
        swept = measured.get("sweep", {"members": 0, "completed": 0, "gpus": 0})
        if swept["completed"] != swept["members"]:
            found.append(f"{key}: {swept['completed']} of {swept['members']} completed.")
        elif swept["gpus"] not in (0, swept["members"]):
            found.append(f"{key}: {swept['members']} members ran on {swept['gpus']} GPUs.")
        elif swept["gpus"] > 1 and not swept["overlap_s"]:
            found.append(f"{key}: its members ran one after the other.")
    return found


def first_line(text: str) -> str:
    """Of a message."""
    return text.strip().splitlines()[0] if text.strip() else ""


# ---- the page ----------------------------------------------------------------------------------


def page(results: Results) -> str:
    """All of it, as Markdown."""
    found = wrong(results)
    lines = [*_head(results), *(["", *(f"- **{line}**" for line in found)] if found else [])]
    for shape in results.shapes():
        rows = [r for r in results.rows if r.row.shape == shape and r.row.way in WAYS]
        if not rows:
            continue
        one = one_device(results, shape)
        lines += ["", f"## {shape}", "", results.workload["shapes"].get(shape, "")]
        lines += ["", *grid(SPEEDS, (speeds(row, one) for row in rows))]
        lines += ["", *grid(LEARNING, (learning(row, one) for row in rows))]
        beside = [f"\\* {r.row.in_words}: beside {', '.join(r.beside)}" for r in rows if r.beside]
        lines += ["", *(f"{line}." for line in beside)] if beside else []
    for result in results.rows:
        lines += _faults(result) if result.row.way == FAULTS else []
        lines += _sweep(result) if result.row.way == SWEEP else []
    return "\n".join([*lines, *_not_well(results)]) + "\n"


def grid(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" + "---:|" * (len(columns) - 1)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def _head(results: Results) -> list[str]:
    machine, work = results.machine, results.workload
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    how = (
        "The batch grows with the number of devices (weak scaling)"
        if work["weak"]
        else "The batch of a step is the same for every number of devices (strong scaling)"
    )
    return [
        "# Scaling over the devices of one host",
        "",
        f"Measured on {machine['devices']} with {versions}, by",
        "",
        "```",
        *results.commands,
        "```",
        "",
        f"{how}. Seconds and tokens a second are medians over a row's steps, of which the first "
        "iteration is left out: it warms everything up. Generation and step count tokens of "
        "responses, updates those of prompts too. *Of N x one*: tokens a second as a share of N "
        "times those of one device. *Times one*: the sync's time as a multiple of one device's. "
        "*First gradient*: norm of the gradient of the first update, which every row of a model "
        "makes on the same recorded samples before anything else.",
    ]


def _faults(result: RowResult) -> list[str]:
    measured = result.measured
    lines = ["", f"## A rank dies: {result.row.shape}, {result.row.devices} trainers", ""]
    if killed := measured.get("killed"):
        lines += [
            f"- Killed in an update: {killed['error']} after {killed['told_s']:.1f} s; "
            f"{killed['ranks_left']} ranks were left; the message "
            f"{'names' if killed['names_a_way_out'] else 'DOES NOT NAME'} the way out.",
        ]
    if held := measured.get("held_out"):
        weights, went = measured.get("weights", {}), measured.get("went_on", {})
        lines += [
            f"- The checkpoint, loaded with {measured['loaded']}: {weights.get('equal')} of "
            f"{weights.get('of')} parameters equal to the bit; held-out log-probs "
            f"{'the same' if held['same'] else 'NOT THE SAME'} (mean difference "
            f"{held['mean']:.2g}, largest {held['largest']:.2g}); the next step "
            f"{'went well' if went.get('finite') else 'DID NOT COME'}.",
        ]
    return [*lines, f"- {result.state}."]


def _sweep(result: RowResult) -> list[str]:
    found = result.measured.get("sweep", {})
    lines = ["", f"## A sweep of {result.row.devices} members", ""]
    if found:
        where = count(found["gpus"], "GPU") if found["gpus"] else "shares of the cores"
        lines += [
            f"- {found['completed']} of {found['members']} completed, on {where}; all of them ran "
            f"at once for {found['overlap_s']} s."
        ]
    return [*lines, f"- {result.state}."]


def _not_well(results: Results) -> list[str]:
    lines: list[str] = []
    for result in results.rows:
        if result.state in ("done", "running"):
            continue
        lines += ["", f"### {result.row.key}: {result.state}", ""]
        lines += [result.why or "Its turn did not come."]
        lines += ["", "```", *result.log, "```"] if result.log else []
    return ["", "## Rows that did not run to their end", *lines] if lines else []
