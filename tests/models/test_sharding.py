"""Tensors whole that ranks have parts of: together what each gives by itself."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from kit.models.sharding import whole, whole_together

SHAPES = [(7, 3), (1, 5), (2,), (6, 2, 4), (9,), (4, 1)]
"""Of three ranks some have fewer rows than others, or none."""


def in_rank(rank: int, file: str) -> None:
    dist.init_process_group(
        "gloo", f"file://{file}", timedelta(seconds=60), world_size=3, rank=rank
    )
    mesh = init_device_mesh("cpu", (3,))
    torch.manual_seed(0)
    full = [torch.randn(shape) for shape in SHAPES]
    values = [distribute_tensor(value, mesh, [Shard(0)]) for value in full]
    values += [full[0], distribute_tensor(full[1], mesh, [Replicate()])]
    values += [distribute_tensor(full[3], mesh, [Shard(1)])]
    dtypes = [None, torch.bfloat16, torch.bfloat16, None, torch.float32, None, None, None, None]
    got = whole_together(values, dtypes)
    for value, dtype, together in zip(values, dtypes, got, strict=True):
        alone = whole(value)
        assert together.dtype == dtype or not dtype
        assert torch.equal(together, alone.to(dtype or alone.dtype))
        assert together.shape == alone.shape
    dist.destroy_process_group()


@pytest.mark.slow
def test_together_they_are_what_each_is_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    multiprocessing.spawn(in_rank, (str(tmp_path / "meet"),), nprocs=3)
