"""What a checkpoint's numbers have to be, looked at before anything of it is used.

Checksums find damage; a checkpoint of a training that went wrong, or one that somebody made, has
checksums that fit. A weight that is not finite would fail a step later, in the engine's sampler,
where nothing says why.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from kit.models.source import safetensors_header
from kit.reports import STEP
from kit.utils.formatting import shorten
from kit.utils.reading import UnreadableError, kind_of, read_object

COUNTERS = "trainer.json"
LARGEST = 2**53
"""Largest counter: as far as whole numbers go in every reader of JSON."""
PART = 1 << 24
"""Numbers looked at together; bounds what is read into memory."""
WEIGHTS, BYTES = "F32", "U8"
"""How safetensors call the types of the trainer's tensors, and of its random states and of the
codes of moments in 8 bits."""
CODES = ("//exp_avg.codes", "//exp_avg_sq.codes")
NEVER_NEGATIVE = ("//step", "//exp_avg_sq", "//exp_avg.scale", "//exp_avg_sq.scale")


def check_trainer(folder: Path) -> None:
    """Look at every tensor and counter that trainers wrote.

    Raises:
        UnreadableError: a file is no safetensors file, a tensor of another type than the trainer's
            or not finite, or a counter no such number.
    """
    counters = read_object(folder / COUNTERS)
    for name in ("optimizer_steps", "updates"):
        counter(counters, name)
    files = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor() as pool:
        faults = [fault for found in pool.map(_faults, files) for fault in found]
    if faults:
        more = f", and {len(faults) - 1} more tensors" if len(faults) > 1 else ""
        raise UnreadableError(f"{faults[0]}{more}")


def _faults(file: Path) -> list[str]:
    """What is wrong with the tensors of one file, a line for each."""
    import numpy as np

    try:
        begin, tensors = safetensors_header(file)
        whole = np.memmap(file, mode="r", dtype=np.uint8)
        found = []
        for name, entry in tensors.items():
            start, end = (begin + int(at) for at in entry["data_offsets"])
            if not begin <= start <= end <= len(whole):
                return [f"{file.name} is cut off"]
            if fault := _fault(name, entry["dtype"], whole[start:end]):
                found.append(f"the tensor {shorten(name, 80)} {fault}")
        return found
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{file.name} is no safetensors file ({shorten(str(error), 80)})"]


def _fault(name: str, dtype: Any, data: Any) -> str:
    """What is wrong with one tensor; "" if nothing."""
    import numpy as np

    of_bytes = name.startswith("random/") or name.endswith(CODES)
    wanted = BYTES if of_bytes else WEIGHTS
    if dtype != wanted:
        return f"is of type {shorten(str(dtype), 20)}, where the trainer has {wanted}"
    if of_bytes:
        return ""
    numbers = data.view(np.float32)
    never_negative = name.endswith(NEVER_NEGATIVE)
    for start in range(0, len(numbers), PART):
        part = numbers[start : start + PART]
        if not np.isfinite(part).all():
            return f"has {int((~np.isfinite(part)).sum()):,} numbers that are not finite"
        if never_negative and part.size and part.min() < 0:
            return "has numbers below 0, where an optimizer has none"
    return ""


def counter(row: Mapping[str, Any], name: str) -> int:
    """A number of times in a row. Raises UnreadableError, KeyError."""
    value = row[name]
    if type(value) is not int or not 0 <= value <= LARGEST:
        given = shorten(str(value), 40) if isinstance(value, (int, float)) else kind_of(value)
        raise UnreadableError(f"{name} is {given}, and it counts from 0 on")
    return value


def history(rows: Any, first: int) -> list[dict[str, Any]]:
    """Rows of metrics, each with its step; version 0.1 wrote none, and began at `first`.

    Raises:
        UnreadableError: a row is no mapping of names to numbers.
    """
    if not isinstance(rows, list):
        raise UnreadableError(f"its history is {kind_of(rows)}, not a list")
    found = []
    for number, metrics in enumerate(rows):
        if not isinstance(metrics, dict) or not all(map(_number, metrics.values())):
            raise UnreadableError(f"row {number + 1} of its history holds more than numbers")
        row = {STEP: first + number, **metrics}
        counter(row, STEP)
        found.append(row)
    return found


def changes(rows: Any) -> list[dict[str, Any]]:
    """Settings that were changed while a session ran. Raises UnreadableError."""
    fits = isinstance(rows, list) and all(
        isinstance(row, dict) and isinstance(row.get("setting"), str) for row in rows
    )
    if not fits:
        raise UnreadableError("its changes are no list of settings")
    for row in rows:
        counter({STEP: 0, **row}, STEP)
    return list(rows)


def _number(value: Any) -> bool:
    if value is None or isinstance(value, float):
        return True
    return type(value) is int and abs(value) <= 1e300


def whole_numbers(row: Mapping[str, Any], names: Iterable[str]) -> list[int]:
    """Several counters of a row. Raises UnreadableError, KeyError."""
    return [counter(row, name) for name in names]
