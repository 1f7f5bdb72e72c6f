"""SGLang's scheduler process, with what the kit does differently in place."""

from __future__ import annotations

from functools import partial
from typing import Any


def engine_class(device: str, threads: int = 1) -> Any:
    """SGLang's engine, with a scheduler that does what the kit needs.

    Args:
        device: `cpu` or `cuda`.
        threads: on a CPU, the cores that its arithmetic takes.
    """
    from sglang.srt.entrypoints.engine import Engine

    run = partial(run_on_cpu, threads) if device == "cpu" else run_on_gpu

    class OurEngine(Engine):
        run_scheduler_process_func = staticmethod(run)

    return OurEngine


def run_on_cpu(threads: int, *args: Any, **kwargs: Any) -> None:
    """The scheduler on a CPU: operators of ours for those that SGLang has for GPUs only."""
    import torch
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kit.stack import prefixes
    from kit.stack.cpu import attention, capture, checksums, operators, pages, sampling

    torch.set_num_threads(threads)
    for part in (attention, capture, checksums, operators, pages, prefixes, sampling):
        part.register()
    run_scheduler_process(*args, **kwargs)


def run_on_gpu(*args: Any, **kwargs: Any) -> None:
    """The scheduler on a GPU."""
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kit.stack import prefixes

    prefixes.register()
    run_scheduler_process(*args, **kwargs)
