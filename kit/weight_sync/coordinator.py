"""`WeightSync`: weights from all trainers to all engines, bucket by bucket, as the driver sees it.

    colocated       every rank fills a buffer that the engine on its own device reads
    disaggregated   rank 0 broadcasts: to a group of rank 0 and all devices of all engines

Either way all ranks gather the weights together, since each has a part of every tensor.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kit.cluster.placement import Placement
from kit.cluster.processes import Watch, engine
from kit.errors import StackError
from kit.weight_sync.transport import ADAPTER, POLICY, SLOTS, unknown_model

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


Wait = Callable[..., Any]
"""Waits for the answers of calls that are `doing` something; raises what the actors raised."""


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

        `watch` ends engines that wait in a broken group; groups come together in `timeout` seconds.
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
        models: Sequence[str] = (POLICY,),
        adapter: str = "",
    ) -> tuple[int, int]:
        """Give all engines the trainers' weights as `version`: (tensors, bytes).

        Without the disturbance if `exact`; without `flush_cache` the engines keep their prefixes,
        which no longer fit the weights; `erase` overwrites all their weights first, to see what
        arrives. Of several `models` one is gathered while the engines load the one before it;
        nothing is generated before all are there. `adapter` is which of them the trainers have,
        where `ADAPTER` is among the models.

        Raises:
            StackError: they did not arrive; the engines go on with what they have.
        """
        for model in models:
            if model not in self.buckets:
                raise unknown_model("trainer", model, self.buckets)
        self.interrupted = True
        group = None if self._layout.colocate else self._open()
        try:
            how = {"flush_cache": flush_cache, "erase": erase, "adapter": adapter}
            answer = self._in_buckets(group, models, version, exact, how)
        except BaseException:
            for actor in self._engines.actors:  # else it would stay paused
                actor.go_on.remote()
            if group:
                self._break(group)
            raise
        self.interrupted = False
        if POLICY in models or ADAPTER in models:
            self.exact, self.engine_version = exact, version
        return answer

    def _in_buckets(
        self,
        group: BroadcastGroup | None,
        models: Sequence[str],
        version: int,
        exact: bool,
        how: dict[str, Any],
    ) -> tuple[int, int]:
        """Send and receive bucket by bucket, and wait for all of it."""
        ranks, engines = self._trainers.actors, self._engines.actors
        sources = [[] if group else self._layout.source_ranks(i) for i in range(len(engines))]
        sent: list[list[Any]] = []
        received: list[list[Any]] = []
        before: list[Any] = [None] * len(engines)
        for model, bucket, told in self._parts(models, how):
            # A buffer is filled again when every engine has read it.
            free = received[-SLOTS] if bucket >= SLOTS else []
            asked = exact, bucket, *free
            if group:
                where = {"give_up": str(group.give_up), "model": model}
                sent.append([rank.broadcast_weights.remote(*asked, **where) for rank in ranks])
                told["spec"] = group.specs[model][bucket]
            else:
                sent.append([rank.export_weights.remote(*asked, model=model) for rank in ranks])
            before = [
                engine.receive_weights.remote(
                    version, *(sent[-1][rank] for rank in feeding), after=done, **told
                )
                for engine, feeding, done in zip(engines, sources, before, strict=True)
            ]
            received.append(before)
        # Engines first: of one that has died, the trainer's own error would only be a consequence.
        # What ranks have sent is fetched where no engine waited for it: a long list of tensors.
        read = {rank for feeding in sources for rank in feeding}
        waited = [*received, *([s for r, s in enumerate(calls) if r not in read] for calls in sent)]
        answers = self._wait([call for calls in waited for call in calls], "sync")
        of_engines = answers[: len(received) * len(engines)]
        if group and not all(answers[len(of_engines) :]):
            raise StackError("The trainer could not send its weights to all engines.")
        tensors, sizes = zip(*of_engines[:: len(engines)], strict=True)  # the first engine's
        return sum(tensors), sum(sizes)

    def _parts(
        self, models: Sequence[str], how: dict[str, Any]
    ) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """(model, bucket, what an engine is told of it), in their order.

        What is to be done once, to begin with or with the first model's end, is done once.
        """
        for number, model in enumerate(models):
            count = self.buckets[model]
            for bucket in range(count):
                yield (
                    model,
                    bucket,
                    {
                        "last": bucket == count - 1,
                        "others_follow": number < len(models) - 1,
                        "erase": how["erase"] and not number and not bucket,
                        "flush_cache": how["flush_cache"] and not number,
                        "adapter": how["adapter"],
                    },
                )

    def _open(self) -> BroadcastGroup:
        """The group of the present actors; another one where one of them was started again."""
        group, ranks, engines = self._group, self._trainers.actors, self._engines.actors
        members = (self._trainers.process_groups, *ranks, *engines)
        if group and group.members == members:
            return group
        first, width = ranks[0], len(self._layout.engines[0])
        name = f"weights-{secrets.token_hex(4)}"
        world = 1 + len(engines) * width
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
        by_model = dict(zip(self.buckets, specs, strict=True))
        self._group = BroadcastGroup(name, members, by_model, give_up)
        return self._group

    def _break(self, group: BroadcastGroup) -> None:
        """End a group that is broken: engines left in it would wait for the rest for ever.

        They hold nothing that is not elsewhere, and are started again when they are needed.
        """
        self._group = None
        group.give_up.touch()
        for index in range(self._layout.replicas):
            self._watch.end(engine(index))
