"""What several runs wrote to the same prompts, read from their `samples.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.errors import DataError
from kit.runs.record import SAMPLES
from kit.samples import Sample

_Kept = dict[int, dict[str, list[dict[str, Any]]]]
"""Of one run: step, prompt, rows."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one group wrote to one prompt."""

    step: int
    sample: Sample
    """The first."""
    responses: int
    """Of the same prompt in the same step."""
    reward: float | None
    """The mean over them."""


def same_prompts(
    groups: Sequence[Sequence[Path]], n: int
) -> tuple[tuple[tuple[Side | None, ...], ...], list[str]]:
    """The first `n` prompts that all groups answered, as late in training as there are any.

    Args:
        groups: the folders of each group's runs; the first that kept samples speaks for it.
        n: prompts.

    Returns:
        A row for each prompt, with None for groups that kept no samples; and what is to know.
    """
    kept = [next((k for folder in group if (k := _read(folder))), None) for group in groups]
    those = [each for each in kept if each]
    if len(those) < min(len(groups), 2):
        return (), []
    notes = [] if all(kept) else ["Some runs kept no samples."]
    common = set.intersection(*(set(each) for each in those))
    for step in sorted(common, reverse=True):
        shared = [p for p in those[0][step] if all(p in each[step] for each in those)]
        if shared:
            at = [dict.fromkeys(shared, step) for _ in kept]
            return _rows(kept, shared[:n], at), notes
    latest = [_latest(each) for each in kept]
    found = [
        prompt
        for prompt in (latest[kept.index(those[0])] or ())
        if all(prompt in places for places, k in zip(latest, kept, strict=True) if k)
    ]
    if not found:
        return (), [*notes, "They have no prompt in common among the samples that they kept."]
    return _rows(kept, found[:n], latest), [*notes, "The samples are of different steps."]


def _rows(
    kept: Sequence[_Kept | None], prompts: Sequence[str], at: Sequence[Mapping[str, int]]
) -> tuple[tuple[Side | None, ...], ...]:
    return tuple(
        tuple(
            _side(steps[prompt], each[steps[prompt]][prompt]) if each else None
            for each, steps in zip(kept, at, strict=True)
        )
        for prompt in prompts
    )


def _latest(kept: _Kept | None) -> dict[str, int]:
    """By prompt: the last step that asked it."""
    return {prompt: step for step in sorted(kept or {}) for prompt in (kept or {})[step]}


def _side(step: int, rows: Sequence[dict[str, Any]]) -> Side:
    rewards = [row["reward"] for row in rows if isinstance(row.get("reward"), (int, float))]
    mean = sum(rewards) / len(rewards) if rewards else None
    return Side(step, Sample.from_dict(rows[0]), len(rows), mean)


def _read(folder: Path) -> _Kept:
    kept: _Kept = {}
    for step, row in _lines(folder / SAMPLES):
        try:
            prompt = Sample.from_dict(row).prompt_text
        except (DataError, ValueError, TypeError):
            continue  # of another version, or damaged
        kept.setdefault(step, {}).setdefault(prompt, []).append(row)
    return kept


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Step and sample of each line; a line that is still being written is left out."""
    if not file.is_file():
        return
    with file.open("rb") as lines:
        for line in lines:
            try:
                row = json.loads(line)
                row.pop("rollout", None)  # a rollout that was saved whole says this of itself
                yield int(row.pop("step")), row
            except (ValueError, TypeError, KeyError, AttributeError):
                continue
