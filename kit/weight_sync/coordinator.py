"""Weights on their way from all trainers to all engines, bucket by bucket.

    colocated       every rank fills a buffer that the engine on its own device reads
    disaggregated   rank 0 broadcasts: a group of rank 0 and all devices of all engines

Either way all ranks gather the weights together, since each has a part of every tensor.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.cluster.processes import engine
from kit.errors import StackError
from kit.weight_sync.transport import SLOTS

if TYPE_CHECKING:
    from kit.stack.stack import Stack
    from kit.weight_sync.transport import BucketSpec


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """A group in which weights are broadcast, and who is in it."""

    name: str
    members: tuple[Any, ...]
    specs: list[BucketSpec]
    give_up: Path
    """Once this file is there, rank 0 waits for nobody."""


def hand_over(stack: Stack, version: int, exact: bool, flush_cache: bool) -> tuple[int, int]:
    """Hand the trainers' weights to all engines as `version`: (tensors, bytes).

    Raises:
        StackError: they did not arrive; the engines go on with what they have.
    """
    stack.residency.for_sync()
    if stack.layout.colocate:
        return _through_memory(stack, version, exact, flush_cache)
    return _by_broadcast(stack, version, exact, flush_cache)


def _through_memory(stack: Stack, version: int, exact: bool, flush: bool) -> tuple[int, int]:
    engines = range(stack.replicas)
    source_ranks = [stack.layout.source_ranks(index) for index in engines]

    def send(bucket: int, free: list[Any]) -> list[Any]:
        return [t.export_weights.remote(version, exact, bucket, *free) for t in stack._trainers]

    def receive(bucket: int, sent: list[Any], before: list[Any], how: dict[str, Any]) -> list[Any]:
        return [
            stack._engines[index].receive_weights.remote(
                version, *(sent[rank] for rank in source_ranks[index]), after=before[index], **how
            )
            for index in engines
        ]

    return _in_buckets(stack, send, receive, flush)


def _by_broadcast(stack: Stack, version: int, exact: bool, flush: bool) -> tuple[int, int]:
    channel = stack.channel = _open(stack, stack.channel)
    sent_all: list[Any] = []

    def send(bucket: int, free: list[Any]) -> list[Any]:
        asked = version, exact, bucket, str(channel.give_up)
        sent = [t.broadcast_weights.remote(*asked, *free) for t in stack._trainers]
        sent_all.extend(sent)
        return sent

    def receive(bucket: int, sent: list[Any], before: list[Any], how: dict[str, Any]) -> list[Any]:
        spec = channel.specs[bucket]
        return [
            actor.receive_broadcast.remote(version, spec, after=done, **how)
            for actor, done in zip(stack._engines, before, strict=True)
        ]

    try:
        answer = _in_buckets(stack, send, receive, flush)
        if not all(stack._get(sent_all, "sync")):
            raise StackError("The trainer could not send its weights to all engines.")
    except BaseException:
        _close(stack, channel)
        raise
    return answer


def _in_buckets(
    stack: Stack,
    send: Callable[[int, list[Any]], list[Any]],
    receive: Callable[[int, list[Any], list[Any], dict[str, Any]], list[Any]],
    flush: bool,
) -> tuple[int, int]:
    """Send and receive bucket by bucket, and wait for all of it."""
    taken: list[list[Any]] = []
    sends: list[list[Any]] = []
    for bucket in range(stack.buckets):
        # A buffer is filled again when every engine has read it.
        free = taken[bucket - SLOTS] if bucket >= SLOTS else []
        before = taken[-1] if taken else [None] * stack.replicas
        how = {"last": bucket == stack.buckets - 1, "flush_cache": flush}
        sends.append(send(bucket, free))
        taken.append(receive(bucket, sends[-1], before, how))
    # Engines first: of one that has died, the trainer's own error would only be a consequence.
    waits = [call for calls in (*taken, *sends) for call in calls]
    try:
        answers = stack._get(waits, "sync")
    except BaseException:
        for actor in stack._engines:  # else it would stay paused
            actor.go_on.remote()
        raise
    firsts = answers[: stack.replicas * stack.buckets : stack.replicas]
    return sum(tensors for tensors, _ in firsts), sum(size for _, size in firsts)


def _open(stack: Stack, channel: BroadcastGroup | None) -> BroadcastGroup:
    """The group of the present actors; another one where one of them was started again."""
    members = (*stack._trainers, *stack._engines)
    if channel and channel.members == members:
        return channel
    first, width = stack._trainers[0], stack.config.engine.tensor_parallel
    name = f"weights-{secrets.token_hex(4)}"
    world = 1 + stack.replicas * width
    limit = stack.config.engine.start_timeout
    stack._get(first.leave_engines.remote(), "sync")
    host = stack.placement.address
    port, specs = stack._get(
        [first.listen.remote(host, world), first.bucket_specs.remote()], "sync"
    )
    meetings = [first.meet_engines.remote(name, world)]
    meetings += [
        actor.meet_trainer.remote(host, port, name, 1 + index * width, world)
        for index, actor in enumerate(stack._engines)
    ]
    stack._get(meetings, "sync", limit)
    return BroadcastGroup(name, members, specs, stack.cluster.directory / "tmp" / f"give-up-{name}")


def _close(stack: Stack, channel: BroadcastGroup) -> None:
    """End a group that is broken: engines that are left in it would wait for the rest for ever.

    They hold nothing that is not elsewhere, and are started again when they are needed.
    """
    stack.channel = None
    channel.give_up.touch()
    for index in range(stack.replicas):
        stack.watch.end(engine(index))
