"""`PromptRow` and `PromptSet`: what a prompt is, and what makes a row malformed.

A row is checked once, when it is loaded, so that a mistake in the data is an error with a row
number in the first second and not a puzzle in the middle of a run.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from kit.config import DataConfig
from kit.errors import DataError, did_you_mean
from kit.samples import Messages


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, with its label and metadata."""

    prompt: str | Messages
    """A string, or chat messages with `role` and `content`."""
    label: str | None
    """The right answer as text; None where the data has none."""
    metadata: dict[str, Any]
    """Whatever else reward functions may want to know."""
    number: int
    """Where the row stands in its source, counted from 1: the line of a JSONL file."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as its source gave it, not checked yet."""

    where: str
    """For messages: `train.jsonl, line 7`."""
    number: int
    raw: Any
    """A mapping, or a string that should hold a JSON object."""


@dataclass(frozen=True, slots=True)
class PromptSet(Sequence[PromptRow]):
    """All prompts of one source. Rows of generated tasks are made when they are read."""

    name: str
    """Short name; evaluation is logged as `eval/{name}`."""
    rows: Sequence[PromptRow] = field(repr=False)
    source: str = ""
    """The notation that it was loaded from."""
    default_reward: str = "exact"
    """Name of the built-in reward that fits the labels."""
    max_response_len: int | None = None
    """How many tokens a response needs, where the task knows it."""
    fingerprint: str = field(default="", repr=False)
    """Equal for equal rows in equal order; a stream's state belongs to one fingerprint."""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", _fingerprint(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def __iter__(self) -> Iterator[PromptRow]:
        return iter(self.rows)

    def __repr__(self) -> str:
        return (
            f"PromptSet({self.name!r}, {len(self)} rows from {self.source or 'memory'}, "
            f"default_reward={self.default_reward!r})"
        )


def check_row(record: Record, config: DataConfig) -> PromptRow:
    """Turn a record into a row. Raises DataError naming the row and the field that is wrong."""
    row, prompt, label = _mapping(record), config.input_key, config.label_key
    if prompt not in row:
        raise DataError(
            f"{record.where}: there is no field {prompt!r}. The row has: "
            f"{', '.join(map(str, row)) or 'no fields'}.",
            fix=f"set data.input_key to the field that holds the prompt. "
            f"{did_you_mean(prompt, map(str, row)) if row else ''}".strip(),
        )
    return PromptRow(
        prompt=_prompt(row[prompt], f"{record.where}: field {prompt!r}"),
        label=_label(row.get(label), f"{record.where}: field {label!r}"),
        metadata=_metadata(
            row.get(config.metadata_key), f"{record.where}: field {config.metadata_key!r}"
        ),
        number=record.number,
    )


def check_rows(records: Sequence[Record], config: DataConfig) -> tuple[PromptRow, ...]:
    """Turn records into rows, checked.

    Raises DataError for the first that is malformed, and for a label or metadata field that the
    settings name but no row has.
    """
    rows = tuple(check_row(record, config) for record in records)
    for setting in ("label_key", "metadata_key"):
        key = getattr(config, setting)
        if key == DataConfig.model_fields[setting].default:
            continue
        seen = {str(name) for record in records for name in _mapping(record)}
        if key not in seen:
            raise DataError(
                f"data.{setting} is {key!r}, but none of the {len(rows)} rows has that field.",
                fix=f"set data.{setting} to a field of the rows. {did_you_mean(key, seen)}",
            )
    return rows


def _mapping(record: Record) -> Mapping[str, Any]:
    row = record.raw
    if isinstance(row, str):
        try:
            row = json.loads(row)
        except ValueError as error:
            raise DataError(
                f"{record.where}: not JSON: {error}.",
                why=f"The line reads: {_short(record.raw)}",
                fix="write one JSON object a line, or name the file .csv or .parquet if it is one.",
            ) from None
    if not isinstance(row, Mapping):
        raise DataError(
            f"{record.where}: a {type(row).__name__}, not a mapping of fields: {_short(row)}",
            fix='write each row as an object such as {"prompt": "1+1=", "label": "2"}.',
        )
    return row


def _prompt(value: Any, where: str) -> str | Messages:
    if isinstance(value, str):
        if value:
            return value
        raise DataError(f"{where} is empty.", fix="give the row a prompt, or leave it out.")
    if not isinstance(value, Sequence) or not value:
        raise DataError(
            f"{where} must be a string or a list of chat messages, not {_short(value)} "
            f"({type(value).__name__}).",
            fix='write text, or [{"role": "user", "content": "..."}].',
        )
    return [_message(message, f"{where}, message {n}") for n, message in enumerate(value, start=1)]


def _message(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is {_short(value)} ({type(value).__name__}), not a mapping.",
            fix='write each message as {"role": "user", "content": "..."}.',
        )
    for key in ("role", "content"):
        if not isinstance(value.get(key), str):
            has = ", ".join(map(str, value)) or "nothing"
            raise DataError(
                f"{where}: {key!r} must be text, not {_short(value.get(key))}. The message "
                f"has: {has}.",
                fix='write each message as {"role": "user", "content": "..."}.',
            )
    # Columnar files give every message the union of all keys, filled with None.
    return {str(key): item for key, item in value.items() if item is not None}


def _label(value: Any, where: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, bool) and isinstance(value, (numbers.Real, Decimal)):
        if math.isfinite(value):
            return str(value)
        raise DataError(
            f"{where} is {value}.", fix="write the answer, or leave the field out where unknown."
        )
    raise DataError(
        f"{where} must be text or a number, not {_short(value)} ({type(value).__name__}).",
        fix="write the answer as text; what has more parts belongs into the metadata.",
    )


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            value = json.loads(value)  # the only way in which a CSV cell can hold a mapping
    if isinstance(value, Mapping):
        return dict(value)
    raise DataError(
        f"{where} must be a mapping, not {_short(value)} ({type(value).__name__}).",
        fix='write it as an object such as {"level": 3}, or set data.metadata_key.',
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _fingerprint(rows: Sequence[PromptRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.label]).encode())
    return digest.hexdigest()[:16]
