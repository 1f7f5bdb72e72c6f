"""The KV cache of a CPU engine takes memory as it is used, and not all of it at the start.

SGLang fills it with zeros. Memory that the operating system gives is zero, and is given when it is
first touched: of the tiny model's 128 MiB a rollout touches a few.
"""

from __future__ import annotations

import math
import mmap
from types import ModuleType
from typing import Any

import torch
from sglang.srt.mem_cache import memory_pool

WORTH_IT = 1 << 20
"""Bytes below which a tensor is made as usual."""


class _Torch(ModuleType):
    """Stands for `torch` in SGLang's module of memory pools."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
        """A tensor of zeros on pages that nobody has touched."""
        shape = tuple(size[0]) if len(size) == 1 and not isinstance(size[0], int) else size
        wanted = dtype or torch.get_default_dtype()
        count = math.prod(shape) * wanted.itemsize
        if count < WORTH_IT or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return torch.zeros(shape, dtype=wanted, **kwargs)
        pages = mmap.mmap(-1, count, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=wanted).reshape(shape)


def register() -> None:
    """Use them in the SGLang of this process."""
    memory_pool.torch = _Torch("torch")
