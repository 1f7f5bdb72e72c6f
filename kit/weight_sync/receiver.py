"""`WeightReceiver`: the engine's side of a weight sync, through memory or by broadcast.

Nothing is generated from the first bucket of a sync to the last: calls that come in meanwhile wait,
and a sync waits for responses that are being written. Each bucket names the model whose weights it
carries; a registry says what the engine does with them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Protocol

from kit.errors import StackError
from kit.weight_sync.transport import (
    ADAPTER,
    BACKENDS,
    POLICY,
    BucketSpec,
    Handle,
    ReceiveBuffer,
    serialize,
    unknown_model,
)
from kit.weight_sync.verify import engine_checksums

PATIENCE = 600.0
"""Seconds that new weights wait for responses that are being written."""
Answer = Awaitable[tuple[bool, str]]
"""SGLang's answer: whether it took the weights, and a message where it did not."""


class Loader(Protocol):
    """What the engine does with the buckets of one model."""

    def from_memory(self, manager: Any, payloads: list[bytes], **common: Any) -> Answer:
        """Load what lies in buffers, one a device, in the form that `serialize` gives them.

        Args:
            manager: SGLang's `tokenizer_manager`.
            payloads: the buffers.
            common: fields of SGLang's request: `load_format`, `flush_cache`, `weight_version`.
        """

    def from_broadcast(self, manager: Any, group: str, spec: BucketSpec, **common: Any) -> Answer:
        """Load what rank 0 sends in the group of this name, as `spec` says; see `from_memory`."""


class PolicyLoader:
    """Loads weights into the model that SGLang serves."""

    def from_memory(self, manager: Any, payloads: list[bytes], **common: Any) -> Answer:
        """See `Loader`."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,
            disable_draft_model=True,  # else SGLang gives them to a draft as well
            **common,
        )
        answer: Answer = manager.update_weights_from_tensor(request, None)
        return answer

    def from_broadcast(self, manager: Any, group: str, spec: BucketSpec, **common: Any) -> Answer:
        """See `Loader`."""
        from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput

        request = UpdateWeightsFromDistributedReqInput(
            names=[entry.name for entry in spec.entries],
            dtypes=[entry.dtype for entry in spec.entries],
            shapes=[list(entry.shape) for entry in spec.entries],
            group_name=group,
            **common,
        )
        answer: Answer = manager.update_weights_from_distributed(request, None)
        return answer


class WeightReceiver:
    """Takes new weights for one engine, and holds back its requests while they arrive."""

    def __init__(self, device: str, manager: Callable[[], Any], version: int = 0) -> None:
        """Know one model, the policy.

        Args:
            device: `cpu` or `cuda`.
            manager: gives SGLang's `tokenizer_manager`, once SGLang runs.
            version: of the weights that the engine starts with.
        """
        self.version = version
        """Of the policy's weights: the number that their sync was given."""
        self._device, self._manager = device, manager
        self._loaders: dict[str, Loader] = {POLICY: PolicyLoader()}
        self._buffers: dict[str, ReceiveBuffer] = {}
        self._open = asyncio.Event()
        self._open.set()
        self._incomplete: set[str] = set()
        """Models that have some buckets of a sync and not all; `resume` does not change that."""
        self._group = ""
        """In which weights are broadcast; empty outside of one."""

    def register(self, model: str, loader: Loader) -> None:
        """Take weights of another model too, and have this loader deal with them."""
        self._loaders[model] = loader

    @property
    def receiving(self) -> bool:
        """Whether a sync is under way, or has broken off."""
        return bool(self._incomplete) or not self._open.is_set()

    async def wait(self) -> None:
        """Return as soon as no sync is under way."""
        await self._open.wait()

    async def receive(
        self,
        spec: BucketSpec,
        version: int,
        *,
        handles: Sequence[Handle] = (),
        last: bool = True,
        others_follow: bool = False,
        flush_cache: bool = True,
        erase: bool = False,
        adapter: str = "",
    ) -> tuple[int, int]:
        """Load a bucket, and go on generating after the last one of all: (tensors, bytes).

        Args:
            spec: what it carries.
            version: the number of the sync.
            handles: where it lies in memory, for each of the engine's devices; rank 0 sends it if
                there are none.
            last: whether no other bucket of its model follows.
            others_follow: whether buckets of another model do, in the same sync.
            flush_cache: False keeps the cached prefixes, which no longer fit the weights.
            erase: overwrite all weights first, to see what arrives.
            adapter: which of them it is, where the model is `ADAPTER`.

        Raises:
            StackError: the model is unknown, or SGLang refused the weights.
        """
        model = spec.model
        if model not in self._loaders:
            raise unknown_model("engine", model, self._loaders)
        await self.pause()
        self._incomplete.add(model)
        loader, manager = self._loaders[model], self._manager()
        if erase:
            await engine_checksums(manager, "erase")
        common = {
            "load_format": "flattened_bucket",
            "flush_cache": flush_cache and last,
            "weight_version": str(version),
        }
        if model == ADAPTER:
            common["adapter"] = adapter
        if handles:
            answer = loader.from_memory(manager, self._payloads(handles), **common)
        else:
            answer = loader.from_broadcast(manager, self._group, spec, **common)
        success, message = await answer
        if not success:
            raise StackError("The engine refused the new weights.", why=message)
        if last:
            self._incomplete.discard(model)
            if model in (POLICY, ADAPTER):
                self.version = version
            if not others_follow:
                self.resume()
        return spec.count, spec.size

    def _payloads(self, handles: Sequence[Handle]) -> list[bytes]:
        first = handles[0]
        if first.ipc:
            return [handle.ipc for handle in handles]
        buffer = self._buffers.setdefault(first.model, ReceiveBuffer())
        return [serialize(buffer.receive(first), first)]

    async def join_group(
        self, host: str, port: int, name: str, first_rank: int, world: int
    ) -> None:
        """Join the group in which rank 0, which listens at this address, sends its weights.

        `first_rank` is that of the engine's devices in it, `world` how many there are in all.

        Raises:
            StackError: rank 0 was not to be reached.
        """
        from sglang.srt.managers.io_struct import (
            DestroyWeightsUpdateGroupReqInput,
            InitWeightsUpdateGroupReqInput,
        )

        manager = self._manager()
        if self._group:
            await manager.destroy_weights_update_group(
                DestroyWeightsUpdateGroupReqInput(group_name=self._group)
            )
        success, message = await manager.init_weights_update_group(
            InitWeightsUpdateGroupReqInput(
                master_address=host,
                master_port=port,
                rank_offset=first_rank,
                world_size=world,
                group_name=name,
                backend=BACKENDS[self._device],
            )
        )
        if not success:
            raise StackError("The engine did not reach the trainer.", why=message)
        self._group = name

    async def pause(self) -> None:
        """Begin nothing new until `resume`, and wait for what is being written to end.

        SGLang could hold it instead; but then one response would be of two models, and SGLang takes
        tens of milliseconds to hold and to go on.

        Raises:
            StackError: it did not end.
        """
        self._open.clear()
        running = self._manager().rid_to_state
        deadline = time.monotonic() + PATIENCE
        while running:
            if time.monotonic() > deadline:
                self._open.set()
                raise StackError(
                    f"The engine is still writing {len(running)} responses, so it cannot take new "
                    "weights.",
                    fix="wait for them, or stop them (interrupt the cell that generates).",
                )
            await asyncio.sleep(0.005)

    def resume(self) -> None:
        """End a pause, if there is one."""
        self._open.set()
