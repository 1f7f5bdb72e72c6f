"""How an update hears that it is to stop: a file that is looked for between micro-batches.

A trainer is busy while it works and answers no call, so the client makes a file. All ranks get the
same answer at the same boundary, or some would wait for the others for ever.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from kit.errors import StoppedError


@dataclass(frozen=True, slots=True)
class StopSign:
    """What one update looks at."""

    file: str | None = None
    """None is never there."""

    def look(self) -> None:
        """Raise StoppedError if the file is there; all ranks call."""
        if self.file is None:
            return
        there = os.path.exists(self.file)
        if dist.get_world_size() > 1:
            seen = torch.tensor([int(there)])
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
            there = bool(seen)
        if there:
            raise StoppedError(
                "The update was stopped between two micro-batches: weights and optimizer are as "
                "before it."
            )


NEVER = StopSign()
