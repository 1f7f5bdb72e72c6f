"""Rollouts as files and as tables: one JSON line a sample, one row a sample, one row a token."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from kit import token_values
from kit.errors import DataError
from kit.samples import Batch, Rollout, Sample

OWN = "rollout"
"""Key of the first line, for what belongs to the rollout and not to one of its samples."""


def write(rollout: Rollout, path: str | Path) -> Path:
    """One JSON line a sample; the first also holds step, seconds, metrics and notes."""
    own = {
        "step": rollout.step,
        "seconds": rollout.seconds,
        "metrics": rollout.metrics,
        "notes": list(rollout.notes),
    }
    target = Path(path)
    with target.open("w", encoding="utf-8") as file:
        for number, sample in enumerate(rollout.samples):
            row = sample.to_dict()
            file.write(json.dumps(row if number else {OWN: own} | row) + "\n")
        if not rollout.samples:
            file.write(json.dumps({OWN: own}) + "\n")
    return target


def read(path: str | Path) -> Rollout:
    """What `write` wrote, or lines of samples alone, as older versions did.

    Raises:
        DataError: with the number of a line that is broken.
    """
    samples: list[Sample] = []
    own: dict[str, Any] = {}
    with Path(path).open("rb") as file:  # so that a line of other bytes is found out by number
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if number == 1 and isinstance(row, dict) and OWN in row:
                    own = dict(row.pop(OWN))
                    Rollout([], **own)  # a field that is too much is this line's fault
                    if not row:
                        continue
                samples.append(Sample.from_dict(row))
            except (ValueError, TypeError, DataError) as error:
                raise DataError(f"{path}, line {number}: not a sample: {error}") from error
    return Rollout(samples, **own)


def write_batch(batch: Batch, path: Path) -> None:
    """A batch as one JSON object."""
    rows = {f.name: getattr(batch, f.name) for f in fields(batch)}
    samples = [sample.to_dict() for sample in batch.samples]
    path.write_text(json.dumps(rows | {"samples": samples}), encoding="utf-8")


def read_batch(path: Path) -> Batch:
    """What `write_batch` wrote. Raises DataError for anything else."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        by_token = {
            name: None if rows[name] is None else tuple(map(tuple, rows[name]))
            for name in ("token_advantages", "values", "returns")
        }
        flat = {name: tuple(rows[name]) for name in ("advantages", "left_out")}
        samples = tuple(map(Sample.from_dict, rows["samples"]))
        return Batch(**rows | by_token | flat | {"samples": samples})
    except (ValueError, TypeError, KeyError, DataError) as error:
        raise DataError(f"{path} holds no batch: {error}") from error


def sample_table(rollout: Rollout) -> Any:
    """A data frame with one row a sample and the columns that a person sorts by."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "group": s.group_index,
                "index": s.index,
                "prompt": s.prompt_text,
                "response": s.response,
                "label": s.label,
                "reward": s.reward,
                "advantage": s.advantage,
                "length": s.response_length,
                "log_prob": _mean(s.rollout_log_probs),
                "status": s.status.value,
                "weight_versions": ", ".join(map(str, s.weight_versions)),
                "error": s.error,
            }
            for s in rollout.samples
        ]
    )


def token_table(sample: Sample) -> Any:
    """A data frame with one row a response token and a column for each quantity that is known."""
    import pandas as pd

    columns = {name: token_values.require(sample, name) for name in token_values.known(sample)}
    whole = {"token": sample.response_tokens, "text": token_values.texts(sample)}
    return pd.DataFrame({**whole, "trained": list(map(bool, sample.mask)), **columns})


def _mean(values: list[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
