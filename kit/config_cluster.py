"""Which Ray cluster a session runs on, and how trainers and engines share its devices."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kit.config_base import Section

if TYPE_CHECKING:
    from kit.config import EngineConfig


class ClusterConfig(Section):
    """Ray, and who has which device; see docs/devices.md."""

    address: str | None = None
    """None starts a Ray head of the session's own on this machine. `auto` joins the Ray cluster
    that runs here already, `HOST:PORT` the one whose head listens there; this machine has to be one
    of its nodes. The cluster's token is taken from where Ray itself looks for it."""
    colocate: bool = True
    """True: trainers and engines share the devices, each engine fed through memory by the trainers
    on its own. False: every trainer and every engine has devices to itself, and weights are
    broadcast (NCCL between GPUs, gloo between CPUs)."""


def check_parallel(engine: EngineConfig) -> None:
    """Raise ValueError for an engine that SGLang could not run, or not feed with weights."""
    data, tensor = engine.data_parallel, engine.tensor_parallel
    if data > 1 and tensor == 1:
        raise ValueError(
            f"engine.data_parallel is {data} and engine.tensor_parallel 1: SGLang takes new "
            "weights in several data-parallel copies only where they share the devices of one "
            f"tensor-parallel engine. What to do: for copies side by side set engine.replicas: "
            f"{data}; else set engine.tensor_parallel to a multiple of {data}."
        )
    if tensor % data:
        raise ValueError(
            f"engine.data_parallel {data} does not divide engine.tensor_parallel {tensor}: "
            "attention is divided among the devices of one engine. What to do: take a divisor of "
            f"{tensor}."
        )
    for key, ours in (("tp_size", "tensor_parallel"), ("dp_size", "data_parallel")):
        if key in engine.extra:
            raise ValueError(
                f"engine.extra has {key}, of which the kit has to know. What to do: set "
                f"engine.{ours} instead."
            )
