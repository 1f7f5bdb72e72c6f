"""`WeightSender`: the trainer's side of a weight sync, through memory or by broadcast.

Every rank has one, since each holds a part of every tensor: all of them gather a bucket, those that
feed an engine put it into a buffer. It knows the models by name and no trainer: it is given each
model's named weights, how one is gathered, and in which dtype the engine gets it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from kit.weight_sync import verify
from kit.weight_sync.transform import EXACT, TURNED, Disturbance, WeightTransform
from kit.weight_sync.transport import (
    BACKENDS,
    BucketSpec,
    DtypeOf,
    Handle,
    SendBuffer,
    in_buckets,
    unknown_model,
)

store: Any = dist  # it names its stores in no way that a type checker can read
NamedWeights = Callable[[], Iterable[tuple[str, torch.Tensor]]]
"""A model's parameters by name as they are now, each as this rank holds it."""
GatherTogether = Callable[
    [Sequence[tuple[str, torch.Tensor]], Sequence[torch.dtype | None]], Iterable[torch.Tensor]
]
AsSaved = Callable[[str, torch.Tensor], Iterable[tuple[str, torch.Tensor]]]
"""Turns a whole parameter into the tensors of its checkpoint, by name."""


@dataclass(slots=True)
class _Model:
    """A model whose weights engines get."""

    named_weights: NamedWeights
    as_saved: AsSaved
    disturbance: Disturbance
    parameters: list[set[str]]
    """Names of the parameters in each bucket."""
    specs: list[BucketSpec]
    dtypes: dict[str, torch.dtype | None]
    """What each parameter may be rounded to before it travels: the engine's dtype of all that the
    checkpoint makes of it."""
    transform: WeightTransform
    """Transform of the last sync."""
    compared_as_sent: bool
    """Whether engines keep the tensors of `as_saved`, so that checksums are of those."""
    renamed: dict[str, str]
    """Saved name of each parameter that `as_saved` gives as it is."""
    present: list[tuple[str, torch.Tensor]] | None = None
    """What `named_weights` gave at the first bucket of the sync that is under way."""


def _dtype_of_all(dtypes: set[torch.dtype]) -> torch.dtype | None:
    return dtypes.pop() if len(dtypes) == 1 else None


class WeightSender:
    """Gathers weights from all ranks, bucket by bucket, and has engines get them."""

    def __init__(
        self,
        device: torch.device,
        gather: Callable[[str, torch.Tensor], torch.Tensor],
        gather_together: GatherTogether | None = None,
        *,
        feeds: bool = True,
        shares_memory: bool = True,
        allocation: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Sends nothing until a model is registered.

        Args:
            device: where the weights are.
            gather: makes the parameter of this name whole; all ranks call it.
            gather_together: the same for several at once, rounded to these dtypes before they
                travel; None asks for them one by one. Checksums are always of what `gather` gives.
            feeds: does this rank hand weights to an engine?
            shares_memory: do engines read its weights from its memory? Else they are broadcast.
            allocation: entered while buffers are made that another process will open.
        """
        self._device, self._gather, self._gather_together = device, gather, gather_together
        self._feeds, self._shares_memory, self._allocation = feeds, shares_memory, allocation
        self.turned: set[str] = set()
        """Models whose weights are sent with other signs, as `transform.turned` makes them."""
        self._models: dict[str, _Model] = {}
        self._buffers: dict[str, SendBuffer] = {}
        self._listening: Any = None
        """The store through which engines find rank 0, while they look for it."""
        self._group: Any = None
        """Rank 0 and all ranks of all engines."""

    def register(
        self,
        model: str,
        named_weights: NamedWeights,
        dtype_of: DtypeOf,
        *,
        bucket_bytes: int,
        as_saved: AsSaved = lambda name, value: ((name, value),),
        disturbance: Disturbance = EXACT,
        compared_as_sent: bool = False,
    ) -> int:
        """Send this model's weights too, or from another source than before; how many buckets.

        Args:
            model: the name under which engines know it.
            named_weights: gives its parameters; called at each sync.
            dtype_of: the engine's dtype of each tensor, by its name in a checkpoint.
            bucket_bytes: the most that a bucket holds, but for a parameter that is larger.
            as_saved: gives a parameter the form and the names that engines load.
            disturbance: what is done to the weights on their way.
            compared_as_sent: checksums are of what `as_saved` gives, which engines keep as it is.
        """
        tensors: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
        renamed: dict[str, str] = {}
        for name, value in named_weights():
            empty = torch.empty(value.shape, device="meta")
            saved_parts = list(as_saved(name, empty))
            tensors[name] = [(saved, tuple(part.shape)) for saved, part in saved_parts]
            if [part is empty for _, part in saved_parts] == [True]:
                renamed[name] = saved_parts[0][0]
        sizes = ((n, BucketSpec.of(model, parts, dtype_of).size) for n, parts in tensors.items())
        buckets = in_buckets(sizes, bucket_bytes)
        specs = [
            BucketSpec.of(model, (part for name in names for part in tensors[name]), dtype_of)
            for names in buckets
        ]
        sent = self._models[model].transform if model in self._models else WeightTransform(EXACT, 0)
        parameters = [set(names) for names in buckets]
        dtypes = {
            name: _dtype_of_all({dtype_of(saved) for saved, _ in parts})
            for name, parts in tensors.items()
        }
        self._models[model] = _Model(
            named_weights,
            as_saved,
            disturbance,
            parameters,
            specs,
            dtypes,
            sent,
            compared_as_sent,
            renamed,
        )
        self._buffers.setdefault(model, SendBuffer(self._device, self._shares_memory))
        return len(buckets)

    def export(self, model: str, bucket: int, updates: int, *, exact: bool) -> Handle | None:
        """Gather a bucket of the weights; a rank that feeds an engine returns where they are.

        Args:
            model: whose weights.
            bucket: which one; with one trainer on a CPU there is only the first.
            updates: how many have made the weights.
            exact: without the disturbance.

        Raises:
            StackError: no model of that name is registered.
        """
        source = self._registered(model)
        if bucket == 0:
            how = EXACT if exact else source.disturbance
            source.transform = WeightTransform(TURNED if model in self.turned else how, updates)
        with torch.no_grad():
            if bucket == 0 or source.present is None:
                source.present = list(source.named_weights())
            named = self._parts(source, source.parameters[bucket])
            if bucket == len(source.specs) - 1:
                source.present = None
            if self._feeds:
                with self._allocation():
                    self._buffers[model].reserve(source.specs[bucket], bucket, source.specs)
                return self._buffers[model].fill(source.specs[bucket], named, bucket)
            for _ in named:  # gathering takes all ranks
                pass
        return None

    def _parts(self, source: _Model, wanted: set[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors of a bucket under the names of the checkpoint."""
        assert source.present is not None
        present = [(name, value) for name, value in source.present if name in wanted]
        return self._saved(source, self._gathered_together(source, present))

    @staticmethod
    def _saved(
        source: _Model, gathered: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in gathered:
            if name in source.renamed:
                yield source.renamed[name], value
            else:
                yield from source.as_saved(name, value)

    def _gathered(
        self, source: _Model, named: Iterable[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Whole parameters as the engine is given them."""
        for name, value in named:
            yield name, source.transform.apply(name, self._gather(name, value))

    def _gathered_together(
        self, source: _Model, named: Sequence[tuple[str, torch.Tensor]]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """As `_gathered`, in few exchanges."""
        if self._gather_together is None:
            yield from self._gathered(source, named)
            return
        as_it_is = source.transform.disturbance == EXACT
        dtypes = [source.dtypes[name] if as_it_is else None for name, _ in named]
        for (name, _), value in zip(named, self._gather_together(named, dtypes), strict=True):
            yield name, source.transform.apply(name, value)

    def _registered(self, model: str) -> _Model:
        if model not in self._models:
            raise unknown_model("trainer", model, self._models)
        return self._models[model]

    def specs(self, model: str) -> list[BucketSpec]:
        """Contents of each bucket of a model."""
        return self._registered(model).specs

    def transform(self, model: str) -> WeightTransform:
        """Transform that the last sync applied to a model's weights."""
        return self._registered(model).transform

    def checksums(self, model: str) -> dict[str, dict[str, list[str]]]:
        """Checksums of what the engine was given; see `verify.trainer_checksums`. All ranks call.

        Raises:
            StackError: no model of that name is registered.
        """
        source = self._registered(model)
        with torch.no_grad():
            gathered = self._gathered(source, source.named_weights())
            if source.compared_as_sent:
                gathered = (part for named in gathered for part in source.as_saved(*named))
            return verify.trainer_checksums(gathered)

    def release(self) -> None:
        """Give back the device memory of the buffers; the next sync makes them anew."""
        for buffer in self._buffers.values():
            buffer.empty()

    # ---- by broadcast --------------------------------------------------------------------------

    def listen(self, host: str, world: int) -> int:
        """Rank 0: leave the group that there was, and be found by engines at the returned port.

        Args:
            host: an address of this machine; nothing listens on any other.
            world: how many will meet.
        """
        self.leave_engines()
        listener = socket.create_server((host, 0))
        port: int = listener.getsockname()[1]
        self._listening = store.TCPStore(
            host,
            port,
            world,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        return port

    def meet_engines(self, name: str, world: int) -> None:
        """Rank 0: wait until all engines have joined the group of this name."""
        from sglang.srt.utils.common import init_custom_process_group

        self._group = init_custom_process_group(
            backend=BACKENDS[self._device.type],
            store=store.PrefixStore(name, self._listening),
            world_size=world,
            rank=0,
            group_name=name,
        )

    def leave_engines(self) -> None:
        """Rank 0: end the group; it is of no use any more."""
        if self._group is not None:
            self._group.abort()
            dist.destroy_process_group(self._group)
        self.forget_engines()

    def forget_engines(self) -> None:
        """Forget the group, which went when all groups of this process were destroyed."""
        self._group = self._listening = None

    def broadcast(
        self, model: str, bucket: int, updates: int, give_up: str, *, exact: bool
    ) -> bool:
        """Gather a bucket, and have rank 0 send it to all engines; False where one is gone.

        Once the file `give_up` is there, nobody has to wait for that one. For the other arguments
        and errors see `export`.
        """
        handle = self.export(model, bucket, updates, exact=exact)
        if handle is None:
            return True
        flat = self._buffers[model].flat(bucket, handle.size)
        try:
            work = dist.broadcast(flat, src=0, group=self._group, async_op=True)
            while work is not None and not work.is_completed():
                if os.path.exists(give_up):
                    self.leave_engines()
                    return False
                time.sleep(0.0005)
            if work is not None:
                work.wait()
        except RuntimeError:  # an engine is gone, which its own call tells
            self.leave_engines()
            return False
        return True
