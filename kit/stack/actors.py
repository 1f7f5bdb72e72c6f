"""The actors of a stack: what each is told, and how it is made, the first time and again."""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kit.cluster.processes import cores

if TYPE_CHECKING:
    from kit.stack.stack import Stack


def engine_name(index: int) -> str:
    """Under which Ray knows an engine's actor."""
    return f"engine-{index}"


def trainer_name(rank: int) -> str:
    """Under which Ray knows a trainer's actor."""
    return f"trainer-{rank}"


def make_engine(stack: Stack, index: int, weight_version: int = 0) -> Any:
    """An engine's actor, not started yet; of which version the weights are that it will read."""
    import ray

    from kit.engine.actor import Engine

    # A group of its own call each, and room for the call that aborts them.
    calls = 1000 + (stack.config.rollout.over_sampling_batch_size or 0)
    actor: Any = ray.remote(Engine)
    places = stack.layout.engines[index]
    options = {**_options(stack, places[0]), "name": engine_name(index), "max_concurrency": calls}
    settings = replace(engine_settings(stack), cards=stack.placement.cards(places))
    return actor.options(**options).remote(settings, weight_version)


def make_trainers(stack: Stack) -> list[Any]:
    """The actors of all ranks, not started yet."""
    import ray

    from kit.stack.trainers import CONTROL
    from kit.trainer.actor import Trainer

    actor: Any = ray.remote(Trainer)
    if stack.config.training.num_trainers > 1:
        # A word that reaches a rank while it waits for another.
        actor = ray.remote(concurrency_groups={CONTROL: 1})(Trainer)
    meeting = secrets.token_hex(4)  # ranks that are started again do not meet those before them
    rendezvous = stack.placement.rendezvous(meeting)
    return [
        actor.options(**_options(stack, place), name=trainer_name(rank)).remote(
            trainer_settings(stack, rank, rendezvous)
        )
        for rank, place in enumerate(stack.layout.trainers)
    ]


def _options(stack: Stack, place: int) -> dict[str, Any]:
    return {
        "num_cpus": 0,
        "num_gpus": 0,
        "max_restarts": 0,
        "lifetime": "detached",  # they outlive this process, as long as the head does
        **stack.placement.options(place),
    }


def engine_settings(stack: Stack) -> Any:
    """What each engine needs to know."""
    from kit.engine.server_args import EngineSettings

    config, engine = stack.config, stack.config.engine
    requests = engine.max_running_requests or max(config.samples_at_once, 256)
    requests = -(-requests // stack.replicas)
    tokens = engine.max_total_tokens
    if tokens is None:
        tokens = stack.plan.kv_tokens
        if stack.device == "cpu":
            tokens = min(requests, 512) * min(stack.model.context_length, 1024)
    return EngineSettings(
        model_path=stack.model.path,
        device=stack.device,
        dtype=stack.dtype,
        context_length=stack.model.context_length,
        max_running_requests=requests,
        seed=config.seed,
        attention_backend=engine.attention_backend,
        max_total_tokens=tokens,
        # The plan says how large the KV cache is; this only has to leave room for it.
        mem_fraction_static=engine.mem_fraction_static or 0.95,
        saves_memory=stack.device == "cuda"
        and config.memory.sleep != "never"
        and not stack.plan.apart,
        needs_tokenizer=bool(config.rollout.stop),
        threads=max(1, cores() // stack.replicas),
        trust_remote_code=config.model.trust_remote_code,
        tensor_parallel=engine.tensor_parallel,
        data_parallel=engine.data_parallel,
        joined=config.cluster.address is not None,
        extra=dict(engine.extra),
    )


def trainer_settings(stack: Stack, rank: int, rendezvous: str = "") -> Any:
    """What one rank needs to know; `rendezvous` is the place where all ranks find each other."""
    from kit.trainer.settings import TrainerSettings
    from kit.weight_sync.transform import Disturbance

    config = stack.config
    return TrainerSettings(
        model_path=stack.model.path,
        training=config.training,
        temperature=config.rollout.temperature,
        device=stack.device,
        dtype=stack.dtype,
        seed=config.seed,
        rank=rank,
        rendezvous=rendezvous,
        cards=stack.placement.cards((stack.layout.trainers[rank],)),
        feeds=stack.layout.feeds(rank),
        shares_memory=stack.layout.colocate,
        max_response_len=stack.max_response_len,
        disturbance=Disturbance(config.engine.weight_bits, config.engine.weight_noise, config.seed),
        trust_remote_code=config.model.trust_remote_code,
        recompute=stack.plan.recompute,
        compile=stack.plan.compile,
        offload=stack.plan.optimizer_cpu_offload,
        max_tokens=stack.plan.max_tokens_per_gpu,
        bucket_bytes=config.engine.update_weight_buffer_size if stack.device == "cuda" else 1 << 62,
        sleeps=stack.plan.trainer_sleeps,
        memory_limit=stack.plan.trainer_limit if config.memory.device_gib else None,
    )
