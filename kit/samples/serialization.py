"""Samples as files and tables: JSON lines, arrays, data frames, and the marks people give them.

`Rollout.save` writes JSON lines, which people read. A rollout of a thousand long responses is a
million tokens: as JSON they take a second, as arrays in a safetensors file (`write_arrays`) a few
hundredths, which is what the journal of a session needs. Nothing is pickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.errors import DataError
from kit.samples import token_values
from kit.samples.rollout import Batch, Rollout
from kit.samples.sample import Sample
from kit.utils.formatting import mean, shorten
from kit.utils.reading import (
    UnreadableError,
    mapping,
    open_regular,
    parse_json,
    read_lines,
    read_object,
)

if TYPE_CHECKING:
    from kit.samples.experts import RoutedExperts

OWN = "rollout"
"""Key of the first line, for what belongs to the rollout and not to one of its samples."""


def write_rollout(rollout: Rollout, path: str | Path) -> Path:
    """Write one JSON line a sample; the first also holds step, seconds, metrics and notes."""
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


def read_rollout(path: str | Path) -> Rollout:
    """Read what `write_rollout` wrote, or lines of samples alone, as older versions wrote them.

    Raises:
        DataError: with the number of a line that is broken.
    """
    samples: list[Sample] = []
    own: dict[str, Any] = {}
    for number, line in _lines(path, "rollout"):
        try:
            row = parse_json(line)
            if number == 1 and isinstance(row, dict) and OWN in row:
                own = dict(row.pop(OWN))
                _of_rollout(own)  # a field that is too much is this line's fault
                if not row:
                    continue
            samples.append(Sample.from_dict(row))
        except (ValueError, TypeError, DataError) as error:
            raise DataError(f"{path}, line {number}: not a sample: {error}") from error
    return Rollout(samples, **own)


def _of_rollout(own: Mapping[str, Any]) -> Rollout:
    """An empty rollout with what belongs to none of its samples. Raises DataError, TypeError."""
    whole = Rollout([], **own)
    numbers = {"seconds": whole.seconds, **whole.metrics}
    wrong = [name for name, v in numbers.items() if v is not None and type(v) not in (int, float)]
    if type(whole.step) is not int:
        wrong.append("step")
    if not all(isinstance(words, str) for words in whole.notes):
        wrong.append("notes")
    if wrong:
        raise DataError(f"Its {shorten(str(wrong[0]), 60)} is of a wrong type.")
    return whole


def _lines(path: str | Path, what: str) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of a file. Raises DataError for what cannot be read, FileNotFoundError."""
    try:
        yield from read_lines(path)
    except UnreadableError as error:
        raise DataError(f"The {what} {path} cannot be read: {error}.") from None


def write_batch(batch: Batch, path: Path) -> None:
    """Write a batch as one JSON object."""
    rows = {f.name: getattr(batch, f.name) for f in fields(batch)}
    samples = [sample.to_dict() for sample in batch.samples]
    path.write_text(json.dumps(rows | {"samples": samples}), encoding="utf-8")


def read_batch(path: Path) -> Batch:
    """Read what `write_batch` wrote. Raises DataError for anything else."""
    try:
        rows = read_object(path)
        if not isinstance(rows.get("id", ""), str) or type(rows.get("step", 0)) is not int:
            raise DataError("Its id is no text, or its step no number.")
        by_token = {
            name: None if rows[name] is None else tuple(map(tuple, rows[name]))
            for name in ("token_advantages", "values", "returns")
        }
        flat = {name: tuple(rows[name]) for name in ("advantages", "left_out")}
        samples = tuple(map(Sample.from_dict, rows["samples"]))
        numbers = {name: by_token[name] or () for name in by_token} | {"": [flat["advantages"]]}
        if not all(type(x) in (int, float) for each in numbers.values() for n in each for x in n):
            raise DataError("An advantage, value or return is no number.")
        return Batch(**rows | by_token | flat | {"samples": samples})
    except (ValueError, TypeError, KeyError, DataError) as error:
        raise DataError(f"{path} holds no batch: {error}") from error


def sample_table(rollout: Rollout) -> Any:
    """A data frame with one row a sample and the columns that a person sorts by."""
    import pandas as pd

    parts = rollout.part_names()
    return pd.DataFrame(
        [
            {
                "group": s.group_index,
                "index": s.index,
                "prompt": s.prompt_text,
                "response": s.response,
                "label": s.label,
                "reward": s.reward,
                **{f"reward/{name}": s.reward_parts.get(name) for name in parts},
                "advantage": s.advantage,
                "length": s.response_length,
                "log_prob": mean(s.rollout_log_probs) if s.rollout_log_probs else None,
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


VALUES = "token_values."
ARRAYS = {
    "tokens": "int64",
    "rollout_log_probs": "float64",
    "loss_mask": "int8",
    "rollout_drafted": "int32",
}
"""Fields with a number a token; those of `token_values` are float64."""
EXPERTS = "rollout_routed_experts"


def write_arrays(file: Path, samples: Sequence[Sample], own: Mapping[str, Any]) -> None:
    """Write samples, and what else is to be known of them, in JSON's types.

    Raises:
        TypeError: the metadata of a prompt holds what JSON does not know.
        OSError: the file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    columns: dict[str, list[float]] = {}
    rows, experts = [], []
    for sample in samples:
        row = {field.name: getattr(sample, field.name) for field in fields(sample)}
        if (record := row.pop(EXPERTS)) is not None:
            row[EXPERTS] = {
                "shape": record.shape, "layers": record.layers, "dtype": str(record.array.dtype),
                "experts": record.count,
            }  # fmt: skip
            experts.append(record.array.reshape(-1).view("uint8"))
        token_values = row.pop("token_values")
        lists = {name: row.pop(name) for name in ARRAYS}
        lists |= {VALUES + name: values for name, values in token_values.items()}
        row["lengths"] = {name: len(x) for name, x in lists.items() if x is not None}
        for name in row["lengths"]:
            columns.setdefault(name, []).extend(lists[name])
        rows.append(row)
    arrays = {
        name: np.array(column, dtype=ARRAYS.get(name, "float64"))
        for name, column in columns.items()
    }
    if experts:
        arrays[EXPERTS] = np.concatenate(experts)
    text = {"rows": json.dumps(rows), "own": json.dumps(dict(own))}
    save_file(arrays or {"": np.zeros(0)}, file, metadata=text)


def read_arrays(file: Path) -> tuple[list[Sample], dict[str, Any]]:
    """Read what `write_arrays` wrote. Raises DataError for a file that is damaged."""
    from safetensors import safe_open

    try:
        open_regular(file).close()
        with safe_open(file, "np") as opened:
            names = opened.keys()
            arrays = {name: opened.get_tensor(name) for name in names}
            text = opened.metadata()
        experts = memoryview(arrays.pop(EXPERTS, b""))
        columns = {name: iter(array.tolist()) for name, array in arrays.items()}
        samples = []
        for row in parse_json(text["rows"]):
            if row.get(EXPERTS):
                row[EXPERTS], experts = _first_record(row[EXPERTS], experts)
            samples.append(_next_sample(row, columns))
        return samples, mapping(parse_json(text["own"]))
    except Exception as error:
        raise DataError(f"{file} is damaged.", why=str(error)) from error


def _first_record(row: Any, written: memoryview) -> tuple[RoutedExperts, memoryview]:
    """(the record that these bytes begin with, the bytes after it)."""
    import numpy as np

    from kit.samples.experts import RoutedExperts

    dtype = np.dtype(row["dtype"])
    size = math.prod(row["shape"]) * dtype.itemsize
    array = np.frombuffer(written[:size], dtype).reshape(row["shape"])
    return RoutedExperts(array, row["layers"], row["experts"]), written[size:]


def _next_sample(row: dict[str, Any], columns: Mapping[str, Iterator[Any]]) -> Sample:
    """The sample of a row, which takes its own numbers from each column."""
    lists = {name: list(islice(columns[name], n)) for name, n in row.pop("lengths").items()}
    values = {name.removeprefix(VALUES): x for name, x in lists.items() if name.startswith(VALUES)}
    plain = {name: x for name, x in lists.items() if name in ARRAYS}
    return Sample.from_dict(row | plain | {"token_values": values})


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A mark on a sample, with enough of the sample to be read without it."""

    label: str = ""
    """`good`, `bad`, `odd`; empty where there is only a note."""
    note: str = ""
    step: int = 0
    """The training step whose weights wrote the sample."""
    group_index: int = 0
    index: int = 0
    """The sample's place in its rollout."""
    prompt: str = ""
    response: str = ""
    reward: float | None = None

    @classmethod
    def of(cls, sample: Sample, step: int, label: str = "", note: str = "") -> Mark:
        """Make a mark of a sample."""
        return cls(
            label=label,
            note=note,
            step=step,
            group_index=sample.group_index,
            index=sample.index,
            prompt=sample.prompt_text,
            response=sample.response,
            reward=sample.reward,
        )

    def fits(self, sample: Sample) -> bool:
        """Whether it is a mark of this sample: the same words, whatever reward they have by now."""
        return (self.group_index, self.index, self.prompt, self.response) == (
            sample.group_index,
            sample.index,
            sample.prompt_text,
            sample.response,
        )


def write_marks(marks: Iterable[Mark], path: str | Path) -> Path:
    """Write one JSON line a mark."""
    target = Path(path)
    lines = (json.dumps(asdict(mark)) + "\n" for mark in marks)
    target.write_text("".join(lines), encoding="utf-8")
    return target


def read_marks(path: str | Path) -> list[Mark]:
    """Read what `write_marks` wrote. Raises DataError with the number of a line that is broken."""
    marks = []
    for number, line in _lines(path, "file of marks"):
        try:
            mark = Mark(**parse_json(line))
            texts = (mark.label, mark.note, mark.prompt, mark.response)
            wholes = (mark.step, mark.group_index, mark.index)
            if not all(isinstance(x, str) for x in texts) or {*map(type, wholes)} != {int}:
                raise TypeError("a field is of another type than a mark's")
            if mark.reward is not None and type(mark.reward) not in (int, float):
                raise TypeError("its reward is no number")
            marks.append(mark)
        except (ValueError, TypeError) as error:
            raise DataError(f"{path}, line {number}: not a mark: {error}") from error
    return marks


def marks_table(marks: Iterable[Mark]) -> Any:
    """Data frame with one row per mark."""
    import pandas as pd

    names = list(Mark.__dataclass_fields__)
    # As objects, because pandas' own text has no place for the half of a surrogate pair.
    table = pd.DataFrame([asdict(mark) for mark in marks], columns=names, dtype=object)
    return table.astype({"step": int, "group_index": int, "index": int, "reward": float})
