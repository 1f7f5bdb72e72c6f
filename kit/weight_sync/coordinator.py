"""`WeightSync`: weights from all trainers to all engines, bucket by bucket, as the driver sees it.

    colocated       every rank fills a buffer that the engine on its own device reads
    disaggregated   rank 0 broadcasts: to a group of rank 0 and all devices of all engines

Either way all ranks gather the weights together, since each has a part of every tensor.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kit.cluster.placement import Placement
from kit.cluster.processes import Watch, engine
from kit.errors import StackError
from kit.weight_sync.transport import POLICY, SLOTS, unknown_model

if TYPE_CHECKING:
    from kit.weight_sync.transport import BucketSpec


class Engines(Protocol):
    """Handles of the engines."""

    actors: list[Any]


class Trainers(Protocol):
    """Handles of the trainers."""

    actors: list[Any]
    process_groups: int
    """How many process groups they have joined; what they had opened beside one went with it."""


class Wait(Protocol):
    """A function that waits for answers of actors."""

    def __call__(self, calls: Any, doing: str, timeout: float | None = None) -> Any:
        """Answers of calls that are `doing` something; raises what the actors raised."""


@dataclass(frozen=True, slots=True)
class BroadcastGroup:
    """Process group in which weights are broadcast."""

    name: str
    members: tuple[Any, ...]
    specs: dict[str, list[BucketSpec]]
    """By model: what each bucket carries."""
    give_up: Path
    """Once this file is there, rank 0 waits for nobody."""


class WeightSync:
    """Sends the trainers' weights to the engines, and knows which the engines have."""

    def __init__(
        self,
        engines: Engines,
        trainers: Trainers,
        wait: Wait,
        placement: Placement,
        watch: Watch,
        timeout: float,
    ) -> None:
        """Send nothing yet.

        Args:
            engines: that receive.
            trainers: that send.
            wait: for their answers.
            placement: which ranks feed which engine, and where rank 0 is reached.
            watch: ends engines that wait in a broken group.
            timeout: seconds within which a group has to come together.
        """
        self.engine_version = 0
        """Which weights the engines have."""
        self.exact = False
        """Whether the last sync left the disturbance out."""
        self.interrupted = False
        """Whether the engines may have some of the new weights and not all."""
        self.buckets: dict[str, int] = {}
        """In how many parts each model's weights travel."""
        self._engines, self._trainers, self._wait = engines, trainers, wait
        self._placement, self._watch, self._timeout = placement, watch, timeout
        self._layout = placement.layout
        self._group: BroadcastGroup | None = None

    def send(
        self,
        version: int,
        *,
        exact: bool,
        flush_cache: bool,
        erase: bool = False,
        model: str = POLICY,
    ) -> tuple[int, int]:
        """Give all engines the trainers' weights as `version`: (tensors, bytes).

        Args:
            version: their number.
            exact: without the disturbance.
            flush_cache: False keeps the engines' prefixes, which no longer fit the weights.
            erase: overwrite all weights of the engines first, to see what arrives.
            model: whose weights.

        Raises:
            StackError: they did not arrive; the engines go on with what they have.
        """
        if model not in self.buckets:
            raise unknown_model("trainer", model, self.buckets)
        self.interrupted = True
        group = None if self._layout.colocate else self._open()
        try:
            how = {"flush_cache": flush_cache, "erase": erase}
            answer = self._in_buckets(group, model, version, exact, how)
        except BaseException:
            for actor in self._engines.actors:  # else it would stay paused
                actor.go_on.remote()
            if group:
                self._break(group)
            raise
        self.interrupted = False
        if model == POLICY:
            self.exact, self.engine_version = exact, version
        return answer

    def _in_buckets(
        self,
        group: BroadcastGroup | None,
        model: str,
        version: int,
        exact: bool,
        how: dict[str, bool],
    ) -> tuple[int, int]:
        """Send and receive bucket by bucket, and wait for all of it."""
        count = self.buckets[model]
        sent: list[list[Any]] = []
        received: list[list[Any]] = []
        for bucket in range(count):
            # A buffer is filled again when every engine has read it.
            free = received[bucket - SLOTS] if bucket >= SLOTS else []
            sent.append(self._ask_trainers(group, model, version, exact, bucket, free))
            before = received[-1] if received else [None] * len(self._engines.actors)
            how = {**how, "last": bucket == count - 1, "erase": how["erase"] and not bucket}
            received.append(self._ask_engines(group, model, version, bucket, sent[-1], before, how))
        # Engines first: of one that has died, the trainer's own error would only be a consequence.
        answers = self._wait([call for calls in (*received, *sent) for call in calls], "sync")
        replicas = len(self._engines.actors)
        if group and not all(answers[replicas * count :]):
            raise StackError("The trainer could not send its weights to all engines.")
        firsts = answers[: replicas * count : replicas]
        return sum(tensors for tensors, _ in firsts), sum(size for _, size in firsts)

    def _ask_trainers(
        self,
        group: BroadcastGroup | None,
        model: str,
        version: int,
        exact: bool,
        bucket: int,
        free: list[Any],
    ) -> list[Any]:
        ranks = self._trainers.actors
        if group is None:
            asked = version, exact, bucket
            return [rank.export_weights.remote(*asked, *free, model=model) for rank in ranks]
        told = version, exact, bucket, str(group.give_up)
        return [rank.broadcast_weights.remote(*told, *free, model=model) for rank in ranks]

    def _ask_engines(
        self,
        group: BroadcastGroup | None,
        model: str,
        version: int,
        bucket: int,
        sent: list[Any],
        before: list[Any],
        how: dict[str, Any],
    ) -> list[Any]:
        """Have a bucket received by each engine, after its call `before`."""
        calls = []
        for index, (actor, done) in enumerate(zip(self._engines.actors, before, strict=True)):
            if group is None:
                handles = [sent[rank] for rank in self._layout.source_ranks(index)]
                call = actor.receive_weights.remote(version, *handles, after=done, **how)
            else:
                spec = group.specs[model][bucket]
                call = actor.receive_broadcast.remote(version, spec, after=done, **how)
            calls.append(call)
        return calls

    def _open(self) -> BroadcastGroup:
        """The group of the present actors; another one where one of them was started again."""
        group, ranks, engines = self._group, self._trainers.actors, self._engines.actors
        members = (self._trainers.process_groups, *ranks, *engines)
        if group and group.members == members:
            return group
        first, width = ranks[0], len(self._layout.engines[0])
        name = f"weights-{secrets.token_hex(4)}"
        world = 1 + len(engines) * width
        self._wait(first.leave_engines.remote(), "sync")
        host = self._placement.address
        asked = [first.bucket_specs.remote(model) for model in self.buckets]
        port, *specs = self._wait([first.listen.remote(host, world), *asked], "sync")
        joins = [first.meet_engines.remote(name, world)]
        joins += [
            actor.meet_trainer.remote(host, port, name, 1 + index * width, world)
            for index, actor in enumerate(engines)
        ]
        self._wait(joins, "sync", self._timeout)
        give_up = self._placement.folder / f"give-up-{name}"
        self._group = BroadcastGroup(
            name, members, dict(zip(self.buckets, specs, strict=True)), give_up
        )
        return self._group

    def _break(self, group: BroadcastGroup) -> None:
        """End a group that is broken: engines left in it would wait for the rest for ever.

        They hold nothing that is not elsewhere, and are started again when they are needed.
        """
        self._group = None
        group.give_up.touch()
        for index in range(self._layout.replicas):
            self._watch.end(engine(index))
