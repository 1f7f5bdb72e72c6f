"""`Row`: one session to be measured; the order of rows, and which of them fit side by side."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kit.utils.formatting import count

WAYS = ("colocated", "tensor_parallel", "apart")
FAULTS, SWEEP = "faults", "sweep"
WIDTH = 2
"""Devices of an engine where it spans several."""


@dataclass(frozen=True, slots=True)
class Row:
    """A shape, a way of sharing devices, and how many devices."""

    shape: str
    way: str
    """One of `WAYS`, or what is tried beside speed: `faults`, `sweep`."""
    devices: int

    @property
    def key(self) -> str:
        """Name in files."""
        return f"{self.shape}-{self.way}-{self.devices}"

    @property
    def trainers(self) -> int:
        """Ranks of FSDP2."""
        return self.devices // 2 if self.way == "apart" else self.devices

    @property
    def tensor_parallel(self) -> int:
        """Devices of each engine."""
        return WIDTH if self.way == "tensor_parallel" else 1

    @property
    def replicas(self) -> int:
        """Engines."""
        rest = self.devices - self.trainers if self.way == "apart" else self.devices
        return rest // self.tensor_parallel

    @property
    def in_words(self) -> str:
        """How the devices are shared, and by whom."""
        each = f" of {self.tensor_parallel}" if self.tensor_parallel > 1 else ""
        who = f"{count(self.trainers, 'trainer')}, {count(self.replicas, 'engine')}"
        return f"{self.way}: {who}{each}"

    def impossible(self, device: str) -> str:
        """Why it cannot run on `cpu` or `cuda`; empty where it can."""
        if self.way == "tensor_parallel" and device == "cpu":
            return "an engine of several devices needs GPUs"
        return ""


def plan(
    shapes: Iterable[str],
    counts: Iterable[int],
    ways: Sequence[str],
    *,
    faults: bool = False,
    sweep: bool = False,
) -> list[Row]:
    """All rows, the most telling first.

    One device and all of them colocated, then the counts between, shape by shape; then the other
    ways, from the most devices to the fewest; then what is tried beside speed.

    Args:
        shapes: names, the most telling first.
        counts: numbers of devices.
        ways: some of `WAYS`.
        faults: a row that kills a rank, on as many devices as there are.
        sweep: a row with a member of a sweep on each device.
    """
    names, numbers = list(shapes), telling(counts)
    rows = [Row(shape, WAYS[0], n) for shape in names for n in numbers if WAYS[0] in ways]
    for shape in names:
        for n in sorted(numbers, reverse=True):
            rows += [Row(shape, way, n) for way in WAYS[1:] if way in ways and n % 2 == 0]
    most = max(numbers)
    rows += [Row(names[-1], FAULTS, most)] * (faults and most > 1)
    rows += [Row("tiny", SWEEP, most)] * sweep
    return rows


def telling(counts: Iterable[int]) -> list[int]:
    """Counts in the order of their turns: 1, the most, and from there down."""
    down = sorted(set(counts), reverse=True)
    return [n for n in down if n == 1] + [n for n in down if n != 1]


def waves(rows: Iterable[Row], devices: int, *, side_by_side: bool) -> list[list[Row]]:
    """Rows that run at the same time, on devices of their own; their order stays that of `rows`
    but for those that are taken along.

    Args:
        rows: the most telling first.
        devices: how many there are.
        side_by_side: whether rows are taken along at all. Faults and sweep always run alone.
    """
    left, found = list(rows), list[list[Row]]()
    while left:
        wave = [left.pop(0)]
        if side_by_side and wave[0].way in WAYS:
            free = devices - wave[0].devices
            for row in [row for row in left if row.way in WAYS]:
                if row.devices <= free:
                    free -= row.devices
                    wave.append(row)
                    left.remove(row)
        found.append(wave)
    return found


def device_sets(wave: Sequence[Row], names: Sequence[str]) -> list[list[str]]:
    """Devices of each row of a wave: none is given twice.

    Args:
        wave: rows that run at the same time.
        names: of all devices.
    """
    found, taken = list[list[str]](), 0
    for row in wave:
        found.append(list(names[taken : taken + row.devices]))
        taken += row.devices
    return found
