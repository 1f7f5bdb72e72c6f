"""Samples in a file that is written in milliseconds: what there is of each token as flat arrays.

A rollout of a thousand long responses is a million tokens. As JSON they take a second, as arrays in
a safetensors file a few hundredths; nothing is pickled. `Rollout.save` writes JSON lines, which
people read; this is for `kit.journal`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from kit.errors import DataError
from kit.samples import Sample

VALUES = "token_values."
ARRAYS = {"tokens": "int64", "rollout_log_probs": "float64", "loss_mask": "int8"}
"""Fields with a number a token; those of `token_values` are float64."""


def write(file: Path, samples: Sequence[Sample], own: Mapping[str, Any]) -> None:
    """Write samples, and what else is to be known of them, in JSON's types.

    Raises:
        TypeError: the metadata of a prompt holds what JSON does not know.
        OSError: the file cannot be written.
    """
    import numpy as np
    from safetensors.numpy import save_file

    columns: dict[str, list[float]] = {}
    rows = []
    for sample in samples:
        row = {field.name: getattr(sample, field.name) for field in fields(sample)}
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
    text = {"rows": json.dumps(rows), "own": json.dumps(dict(own))}
    save_file(arrays or {"": np.zeros(0)}, file, metadata=text)


def read(file: Path) -> tuple[list[Sample], dict[str, Any]]:
    """What `write` wrote. Raises DataError for a file that is damaged."""
    from safetensors import safe_open

    try:
        with safe_open(file, "np") as opened:
            names = opened.keys()
            columns = {name: opened.get_tensor(name).tolist() for name in names}
            text = opened.metadata()
        rows = json.loads(text["rows"])
        places = {name: _places(rows, name) for name in columns}
        samples = [
            _sample(row, {name: columns[name][slice(*places[name][i])] for name in row["lengths"]})
            for i, row in enumerate(rows)
        ]
        return samples, json.loads(text["own"])
    except Exception as error:
        raise DataError(f"{file} is damaged.", why=str(error)) from error


def _places(rows: list[dict[str, Any]], name: str) -> list[tuple[int, int]]:
    return list(pairwise(accumulate((row["lengths"].get(name, 0) for row in rows), initial=0)))


def _sample(row: dict[str, Any], lists: dict[str, list[Any]]) -> Sample:
    own = {name: value for name, value in row.items() if name != "lengths"}
    values = {name.removeprefix(VALUES): x for name, x in lists.items() if name.startswith(VALUES)}
    plain = {name: x for name, x in lists.items() if name in ARRAYS}
    return Sample.from_dict(own | plain | {"token_values": values})
