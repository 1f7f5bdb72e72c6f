"""Actors of a stack: what is decided before one starts, its settings, and how Ray makes it."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.cluster.client import PACKAGE_ROOT
from kit.cluster.placement import Layout, Placement
from kit.cluster.processes import cores
from kit.config import SessionConfig
from kit.memory import MemoryPlan
from kit.models.adapters import AdapterShape, located
from kit.models.source import ModelSource

if TYPE_CHECKING:
    from kit.engine.adapters import AdapterSettings
    from kit.engine.drafts.settings import SpeculativeSettings
    from kit.engine.server_args import EngineSettings
    from kit.trainer.settings import OwnSettings, TrainerSettings

CONTROL = "control"
"""Ray's concurrency group for a call that has to reach a rank while it waits in another."""


@dataclass(slots=True)
class StackSettings:
    """What is decided before any process starts. `config` can change after that; and with it
    `max_response_len` and `loss` where another session has its turn.
    """

    config: SessionConfig
    model: ModelSource
    device: str
    dtype: str
    max_response_len: int
    plan: MemoryPlan
    layout: Layout
    loss: Callable[..., Any] | None = None
    """A loss function of the user's own."""
    draft: ModelSource | None = None
    """The model that drafts; None where none does."""


def engine_name(index: int) -> str:
    """Ray's name of an engine's actor."""
    return f"engine-{index}"


def trainer_name(rank: int) -> str:
    """Ray's name of a trainer's actor."""
    return f"trainer-{rank}"


def make_engine(
    settings: StackSettings, placement: Placement, index: int, weight_version: int = 0
) -> Any:
    """Make an engine's actor, not started yet; it will read weights of this version."""
    import ray

    from kit.engine.actor import Engine

    # A group of its own call each, and room for the call that aborts them.
    calls = 1000 + (settings.config.rollout.over_sampling_batch_size or 0)
    actor: Any = ray.remote(Engine)
    places = settings.layout.engines[index]
    options = {**_options(placement, places[0]), "name": engine_name(index)}
    own = replace(engine_settings(settings), cards=placement.visible_devices(places))
    return actor.options(**options, max_concurrency=calls).remote(own, weight_version)


def make_trainers(settings: StackSettings, placement: Placement) -> list[Any]:
    """Make the actors of all ranks, not started yet."""
    import ray

    from kit.trainer.actor import Trainer

    actor: Any = ray.remote(Trainer)
    if settings.config.training.num_trainers > 1:
        actor = ray.remote(concurrency_groups={CONTROL: 1})(Trainer)
    # Ranks that are started again do not meet those before them.
    rendezvous = placement.rendezvous(secrets.token_hex(4))
    return [
        actor.options(**_options(placement, place), name=trainer_name(rank)).remote(
            trainer_settings(settings, placement, rank, rendezvous)
        )
        for rank, place in enumerate(settings.layout.trainers)
    ]


def _options(placement: Placement, place: int) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "lifetime": "detached",  # they outlive this process, as long as the head does
        **placement.options(place),
    }


def forget_actor(actor: Any, name: str) -> None:
    """Kill an actor and whichever has its name by now, so that Ray gives the name free."""
    import ray

    with suppress(Exception):
        ray.kill(actor)
    with suppress(Exception):
        ray.kill(ray.get_actor(name))


def engine_settings(stack: StackSettings) -> EngineSettings:
    """Settings of each engine."""
    from kit.engine.server_args import EngineSettings

    config, engine = stack.config, stack.config.engine
    requests = engine.max_running_requests or max(config.samples_at_once, 256)
    requests = -(-requests // stack.layout.replicas)
    tokens = engine.max_total_tokens
    if tokens is None:
        tokens = stack.plan.kv_tokens
        if stack.device == "cpu":
            tokens = min(requests, 512) * min(stack.model.context_length, 1024)
    return EngineSettings(
        engine,
        model_path=stack.model.path,
        device=stack.device,
        dtype=stack.dtype,
        context_length=stack.model.context_length,
        max_running_requests=requests,
        seed=config.seed,
        max_total_tokens=tokens,
        saves_memory=stack.device == "cuda"
        and config.memory.sleep != "never"
        and not stack.plan.apart,
        needs_tokenizer=bool(config.rollout.stop),
        threads=max(1, cores() // stack.layout.replicas),
        trust_remote_code=config.model.trust_remote_code,
        joined=config.cluster.address is not None,
        shares_operators=config.training.true_on_policy,
        experts=stack.model.experts if config.records_experts else None,
        adapters=_engine_adapters(stack),
        quantization=config.quantization,
        speculative=_speculative(stack),
    )


def _speculative(stack: StackSettings) -> SpeculativeSettings | None:
    """How the engines draft; None where they do not."""
    from kit.engine.drafts.settings import SpeculativeSettings

    config = stack.config.engine.speculative
    if config is None:
        return None
    return SpeculativeSettings.of(config, stack.draft)


def _engine_adapters(stack: StackSettings) -> AdapterSettings | None:
    """Adapters that the engines have beside their weights; None where none or merged ones."""
    from kit.engine.adapters import AdapterSettings

    lora, engine = stack.config.model.lora, stack.config.engine
    if lora is None or engine.lora != "adapter":
        return None
    kinds = AdapterShape.of(stack.config.model, stack.model).kinds
    return AdapterSettings.of(lora.r, lora.factor, kinds, engine.max_loras_per_batch)


def trainer_settings(
    stack: StackSettings, placement: Placement, rank: int, rendezvous: str = ""
) -> TrainerSettings:
    """Settings of one rank; `rendezvous` is where all ranks find each other."""
    from kit.trainer.settings import TrainerSettings
    from kit.weight_sync.transform import Disturbance

    config = stack.config
    drafts = config.engine.speculative
    return TrainerSettings(
        model_path=stack.model.path,
        training=config.training,
        temperature=config.rollout.temperature,
        device=stack.device,
        dtype=stack.dtype,
        seed=config.seed,
        rank=rank,
        rendezvous=rendezvous,
        cards=placement.visible_devices((stack.layout.trainers[rank],)),
        feeds=stack.layout.feeds(rank),
        shares_memory=stack.layout.colocate,
        max_response_len=stack.max_response_len,
        loss=stack.loss,
        disturbance=Disturbance(config.engine.weight_bits, config.engine.weight_noise, config.seed),
        trust_remote_code=config.model.trust_remote_code,
        lora=config.model.lora and located(config.model.lora),
        draft_path=stack.draft.path if stack.draft and config.training.draft else None,
        draft_head=drafts.head if drafts else None,
        sends_adapters=config.engine.lora == "adapter",
        quantization=config.quantization,
        trains_quantized=config.model.quantization is not None,
        recompute=stack.plan.recompute,
        compile=stack.plan.compile,
        offload=stack.plan.optimizer_cpu_offload,
        max_tokens=stack.plan.max_tokens_per_gpu,
        bucket_bytes=config.engine.update_weight_buffer_size if stack.device == "cuda" else 1 << 62,
        sleeps=stack.plan.trainer_sleeps,
        attention_backend=config.engine.attention_backend,
        memory_limit=stack.plan.trainer_limit if config.memory.device_gib else None,
    )


def own_settings(stack: StackSettings, name: str) -> OwnSettings:
    """Settings of the trainers that are those of one session, which has this name among all."""
    from kit.trainer.settings import OwnSettings

    config = stack.config
    return OwnSettings(
        name=name,
        training=config.training,
        temperature=config.rollout.temperature,
        seed=config.seed,
        max_response_len=stack.max_response_len,
        loss=stack.loss,
    )


def fingerprint(stack: StackSettings) -> str:
    """Hash of everything that cannot be changed in a running process."""
    config = stack.config
    what = {
        "engine": engine_settings(stack).identity,
        "replicas": stack.layout.replicas,
        "layout": asdict(stack.layout),
        "cluster": config.cluster.address,
        "calls": config.rollout.over_sampling_batch_size or 0,
        "device": stack.device,
        "sleeps": [stack.plan.kv_sleeps, stack.plan.trainer_sleeps],
        "memory": config.memory.device_gib,
        "model": _files(Path(stack.model.path), "*"),
        "draft": _files(Path(stack.draft.path), "*") if stack.draft else [],
        # Engines of a session that trained its draft no longer have that of the files.
        "trains_draft": config.training.draft is not None,
        "cards": os.environ.get("CUDA_VISIBLE_DEVICES", ""),
        "python": sys.executable,
        "kit": _files(PACKAGE_ROOT / "kit", "**/*.py"),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()


def _files(folder: Path, pattern: str) -> list[tuple[str, int, int]]:
    """Name, size and time of each: the kit's own code may have changed since a process took it."""
    files = []
    for file in sorted(folder.glob(pattern)):
        if file.is_file():
            status = file.stat()
            files.append((str(file), status.st_size, status.st_mtime_ns))
    return files
