"""Reads back what the three libraries wrote."""

from __future__ import annotations

import json
import sqlite3
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def tensorboard(folder: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, str]]:
    """Scalars as (step, value), and texts, by name."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder), size_guidance={"tensors": 0})
    found.Reload()
    scalars: dict[str, list[tuple[int, float]]] = {}
    texts: dict[str, str] = {}
    for name in found.Tags()["tensors"]:
        for event in found.Tensors(name):
            value = make_ndarray(event.tensor_proto)
            if value.dtype == object:
                texts[name] = value[0].decode()
            else:
                scalars.setdefault(name, []).append((event.step, float(value)))
    return scalars, texts


def wandb(folder: Path) -> tuple[Rows, dict[str, Any], dict[str, str], Any]:
    """History, configuration, each metric's step metric, and the run's record."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    history: Rows = []
    config: dict[str, Any] = {}
    steps: dict[str, str] = {}
    run = None
    for data in _records(file.read_bytes()):
        record = Record.FromString(data)
        if record.HasField("history"):
            items = record.history.item
            row = {"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items}
            history.append({k: v for k, v in row.items() if not k.startswith("_")})
        if record.HasField("run"):
            run = record.run
            config |= {i.key: json.loads(i.value_json) for i in run.config.update}
        if record.HasField("metric"):
            steps[record.metric.glob_name or record.metric.name] = record.metric.step_metric
    return history, config, steps, run


def trackio(folder: Path, project: str) -> tuple[Rows, dict[str, Any]]:
    """Rows and configuration of the only run."""
    with sqlite3.connect(folder / "trackio" / f"{project}.db") as database:
        rows = database.execute("select metrics from metrics order by id").fetchall()
        (config,) = database.execute("select config from configs").fetchone()
    return [json.loads(row) for (row,) in rows], json.loads(config)


def _records(file: bytes) -> Iterator[bytes]:
    """The records of a LevelDB log, which a .wandb file is behind its seven bytes of header."""
    block, at, whole = 32768, 7, b""
    while at + 7 <= len(file):
        if block - at % block < 7:
            at += block - at % block
            continue
        size, kind = struct.unpack_from("<HB", file, at + 4)
        if not kind:
            return
        whole += file[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            yield whole
            whole = b""
