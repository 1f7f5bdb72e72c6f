"""`Sums`: metrics added up over micro-batches on the device, and over ranks at the end.

Reading a number makes the host wait for the device; here that happens once an optimizer step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist


@dataclass(slots=True)
class Sums:
    """One float64 sum a name."""

    device: torch.device
    _names: tuple[str, ...] = field(default=())
    _total: torch.Tensor | None = None

    def add(self, values: Mapping[str, torch.Tensor]) -> None:
        """Add the values of a micro-batch; the same names each time."""
        self._names = tuple(sorted(values))
        row = torch.stack([values[name].double() for name in self._names])
        self._total = row if self._total is None else self._total + row

    def total(self) -> dict[str, float]:
        """The sums over all ranks; all of them call."""
        assert self._total is not None
        total = self._total.cpu()
        dist.all_reduce(total)
        return dict(zip(self._names, total.tolist(), strict=True))
