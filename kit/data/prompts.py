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
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

from kit.config import DataConfig
from kit.data.conversations import check_prompt, short
from kit.data.plain import plain
from kit.errors import DataError, did_you_mean
from kit.samples import Messages
from kit.utils.reading import parse_json

_WRITTEN_OUT = 30
"""Digits before or after the point up to which a number has no exponent."""


@dataclass(frozen=True, slots=True)
class PromptRow:
    """One prompt, with its label and metadata."""

    prompt: str | Messages
    """A string, or chat messages with `role` and `content`."""
    label: Any
    """The right answer as text; a list, mapping or truth value as it is; None where the data has
    none."""
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
    row, key, label = _mapping(record), config.input_key, config.label_key
    prompt = field_of(row, key)
    if prompt is None and key not in row:
        raise DataError(
            f"{record.where}: there is no field {key!r}. The row has: "
            f"{', '.join(map(str, row)) or 'no fields'}.",
            fix=f"set data.input_key to the field that holds the prompt. "
            f"{did_you_mean(key, map(str, row)) if row else ''}".strip(),
        )
    return PromptRow(
        prompt=check_prompt(prompt, f"{record.where}: field {key!r}"),
        label=_label(field_of(row, label), f"{record.where}: field {label!r}"),
        metadata=_metadata(
            field_of(row, config.metadata_key), f"{record.where}: field {config.metadata_key!r}"
        ),
        number=record.number,
    )


def field_of(row: Mapping[str, Any], key: str) -> Any:
    """Value of a field; of one inside another, `reward_model.ground_truth`; None without it.

    A field that holds JSON text of a mapping is read as one where a key inside it is named.
    """
    if key in row or "." not in key:
        return row.get(key)
    first, _, rest = key.partition(".")
    inner = row.get(first)
    if isinstance(inner, str) and inner.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            inner = parse_json(inner)
    return field_of(inner, rest) if isinstance(inner, Mapping) else None


def check_rows(records: Sequence[Record], config: DataConfig) -> tuple[PromptRow, ...]:
    """Turn records into rows, checked.

    Raises DataError for the first that is malformed, and for a label or metadata field that the
    settings name but no row has.
    """
    rows = _without_float_labels(tuple(check_row(record, config) for record in records))
    for setting in ("label_key", "metadata_key"):
        key = getattr(config, setting)
        if key == DataConfig.model_fields[setting].default:
            continue
        every = [_mapping(record) for record in records]
        if all(field_of(row, key) is None and key not in row for row in every):
            seen = {str(name) for row in every for name in row}
            raise DataError(
                f"data.{setting} is {key!r}, but none of the {len(rows)} rows has that field.",
                fix=f"set data.{setting} to a field of the rows. {did_you_mean(key, seen)}",
            )
    return rows


_FLOAT_OF_WHOLE = re.compile(r"-?\d+\.0")


def _without_float_labels(rows: tuple[PromptRow, ...]) -> tuple[PromptRow, ...]:
    """The rows; whole numbers that a table with a gap made floats of, "72.0", are whole again."""
    texts = [row.label for row in rows if row.label is not None]
    floats = [isinstance(text, str) and _FLOAT_OF_WHOLE.fullmatch(text) for text in texts]
    if len(texts) == len(rows) or not texts or not all(floats):
        return rows
    return tuple(
        row if row.label is None else replace(row, label=row.label.removesuffix(".0"))
        for row in rows
    )


def _mapping(record: Record) -> Mapping[str, Any]:
    row = record.raw
    if isinstance(row, str):
        try:
            row = parse_json(row)
        except ValueError as error:
            raise DataError(
                f"{record.where}: {error}.",
                why=f"The line reads: {short(record.raw)}",
                fix="write one JSON object a line, or name the file .csv or .parquet if it is one.",
            ) from None
    if not isinstance(row, Mapping):
        raise DataError(
            f"{record.where}: a {type(row).__name__}, not a mapping of fields: {short(row)}",
            fix='write each row as an object such as {"prompt": "1+1=", "label": "2"}.',
        )
    return row


def _label(value: Any, where: str) -> Any:
    value = plain(value)
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, (numbers.Real, Decimal)):
        if math.isfinite(value):
            return number_text(value)
        raise DataError(
            f"{where} is {value}.", fix="write the answer, or leave the field out where unknown."
        )
    if isinstance(value, (list, dict)):
        return value
    raise DataError(
        f"{where} must be text, a number, a list or a mapping, not {short(value)} "
        f"({type(value).__name__}).",
        fix="write the answer as text; what has more parts belongs into the metadata.",
    )


def number_text(value: float | Decimal | numbers.Real) -> str:
    """A number as a person writes it, for graders that compare text: 72.0 is `72`.

    A column of whole numbers with a gap comes as floats. Floats keep 15 digits, which is all that
    one holds of a decimal number: 0.1 + 0.2 is `0.3`, and 1e22 a one with 22 zeros.
    """
    if isinstance(value, numbers.Integral):
        return str(int(value))
    exact = value if isinstance(value, Decimal) else Decimal(f"{float(value):.15g}")
    if not -_WRITTEN_OUT <= exact.adjusted() <= _WRITTEN_OUT:
        return str(value)
    if not exact:
        return "0"
    whole = exact.to_integral_value()
    return f"{whole if whole == exact else exact:f}"


def _metadata(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if isinstance(value, str) and value.lstrip().startswith("{"):
        with contextlib.suppress(ValueError):
            value = parse_json(value)  # the only way in which a CSV cell can hold a mapping
    value = plain(value)
    if isinstance(value, dict):
        return value
    raise DataError(
        f"{where} must be a mapping, not {short(value)} ({type(value).__name__}).",
        fix='write it as an object such as {"level": 3}, or set data.metadata_key.',
    )


def _fingerprint(rows: Sequence[PromptRow]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.prompt, row.label], default=str).encode())
    return digest.hexdigest()[:16]
