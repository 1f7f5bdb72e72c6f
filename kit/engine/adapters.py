"""Adapters of SGLang's own: what an engine is told of them, and what is changed in SGLang for them.

An adapter has another name at each version. SGLang keys its prefixes by the adapter that computed
them, so none is taken over from one version to the next.

Read from SGLang 0.5.16, and changed in the process that talks to its scheduler:
    managers/tokenizer_manager.py   _handle_abort_req: a request that is aborted while it waits for
                            its turn goes on being counted as a user of its adapter, which is then
                            waited for without end where it is unloaded. Ours ends the count.

Changed in its scheduler:
    lora/lora_manager.py    load_lora_weights_from_tensors: takes each tensor through host memory,
                            and copies to the device when the first request comes. Ours gets one
                            flat tensor and a table (`kit.weight_sync.transport.serialize`), keeps a
                            copy where it is, and fills the adapter's slot of the pool at once.
    lora/mem_pool.py        load_lora_weight_to_buffer, _clear_buffer_slot_for_base: hundreds of
                            small copies, which take longer than the bytes. Ours are one.
    managers/tp_worker.py   load_lora_adapter_from_tensors: opens memory of another process without
                            having torch name cards as the sender does. Hands on what it does not
                            know the form of, which is why ours arrives.
    lora/*, on a CPU        tensors in pinned memory, which takes a GPU.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from math import prod
from types import ModuleType
from typing import Any
from weakref import finalize

from kit.errors import StackError
from kit.models.adapters import FUSED, SGLANG

RELEASED = (HTTPStatus.SERVICE_UNAVAILABLE, HTTPStatus.INTERNAL_SERVER_ERROR)
"""Statuses of aborted requests that SGLang counts as ended."""


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """The adapters that an engine has room for."""

    rank: int
    factor: float
    """What B A is multiplied by."""
    target_modules: tuple[str, ...]
    """Last names of the layers that may have one."""
    slots: int
    """How many can be in use at once."""

    @classmethod
    def of(cls, rank: int, factor: float, modules: Sequence[str], slots: int) -> AdapterSettings:
        """Those of layers with these names, and of layers that SGLang computes with them."""
        names = {name.rpartition(".")[2] for name in modules}
        for group in FUSED:
            if names & set(group):
                names |= set(group)
        return cls(rank, factor, tuple(sorted(names)), slots)

    @property
    def peft_config(self) -> dict[str, Any]:
        """What SGLang reads of an adapter's configuration. It knows no factor but alpha / r."""
        return {
            "peft_type": "LORA",
            "r": self.rank,
            "lora_alpha": self.factor * self.rank,
            "target_modules": list(self.target_modules),
            "bias": "none",
        }

    def server_arguments(self, device: str) -> dict[str, Any]:
        """The fields of `sglang.ServerArgs` that say so."""
        arguments = {
            "enable_lora": True,
            "max_lora_rank": self.rank,
            "lora_target_modules": list(self.target_modules),
            "max_loras_per_batch": self.slots,
            "lora_strict_loading": True,  # else it leaves out what it does not know
        }
        return arguments | ({"lora_backend": "torch_native"} if device == "cpu" else {})


class AdapterLoader:
    """Loads adapters beside the model's weights; a `Loader` of `kit.weight_sync.receiver`."""

    def __init__(self, settings: AdapterSettings) -> None:
        """Have none yet."""
        self._settings = settings
        self.names: dict[str, str] = {}
        """By adapter: SGLang's name for its present version."""
        self.versions: dict[str, int] = {}
        """By adapter: the number of its present version."""
        self._leaving: asyncio.Task[None] | None = None
        """Forgets the version before, while the engine goes on with the new one."""

    async def from_memory(
        self, manager: Any, payloads: list[bytes], **common: Any
    ) -> tuple[bool, str]:
        """Load a version of an adapter, and forget the one before.

        Of `common` it reads `adapter`, which one it is, and `weight_version`.
        """
        from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

        adapter = common["adapter"]
        name = f"{adapter}:{common['weight_version']}"
        await self._settle()
        old = self.names.get(adapter)
        if old == name:  # the same weights once more: a sync was made again
            await self.unload(manager, adapter)
            old = None
        payload: Any = payloads[0]
        request = LoadLoRAAdapterFromTensorsReqInput(
            lora_name=name,
            config_dict=self._settings.peft_config,
            serialized_tensors=payload,
        )
        answer = await manager.load_lora_adapter_from_tensors(request)
        if not answer.success:
            return False, str(answer.error_message)
        if old:
            self._leaving = asyncio.create_task(_unload(manager, old))
        self.names[adapter], self.versions[adapter] = name, int(common["weight_version"])
        return True, ""

    async def unload(self, manager: Any, adapter: str) -> None:
        """Forget an adapter, if it is there, once nothing is written under it.

        Raises:
            StackError: SGLang keeps it.
        """
        await self._settle()
        if name := self.names.pop(adapter, None):
            await _unload(manager, name)

    async def _settle(self) -> None:
        """Wait until the version before is forgotten. Raises StackError if SGLang keeps it."""
        leaving, self._leaving = self._leaving, None
        if leaving:
            await leaving

    def from_broadcast(
        self, manager: Any, group: str, spec: Any, **common: Any
    ) -> Awaitable[tuple[bool, str]]:
        """Refuse: SGLang reads adapters from memory only."""
        raise StackError("Adapters cannot be broadcast.", fix="set engine.lora: merged.")

    def name_of(self, adapter: str) -> str:
        """SGLang's name for the present version. Raises StackError where there is none."""
        if adapter not in self.names:
            known = ", ".join(self.names) or "none"
            raise StackError(
                f"The engine has no adapter {adapter!r} ({known}).",
                fix="call session.sync(), and generate again.",
            )
        return self.names[adapter]


async def _unload(manager: Any, name: str) -> None:
    """Have SGLang forget an adapter of this name. Raises StackError if it keeps it."""
    from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

    answer = await manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
    if not answer.success:
        raise StackError("The engine kept an old adapter.", why=str(answer.error_message))


def release_what_is_aborted() -> None:
    """Have SGLang's tokenizer manager count no request that was aborted before it was begun.

    Called once in an engine's process.
    """
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    kind: Any = TokenizerManager
    handle = kind._handle_abort_req
    releases: set[asyncio.Task[None]] = set()

    def handle_and_release(manager: Any, aborted: Any) -> None:
        state = manager.rid_to_state.get(aborted.rid)
        handle(manager, aborted)
        reason = aborted.finished_reason or {}
        # With such a status SGLang does it itself, where it hands the answer over.
        if state and state.obj.lora_path and reason.get("status_code") not in RELEASED:
            task = asyncio.create_task(manager.lora_registry.release(state.obj.lora_id))
            releases.add(task)  # asyncio itself holds a task loosely
            task.add_done_callback(releases.discard)

    kind._handle_abort_req = handle_and_release


# ---- in SGLang's scheduler ---------------------------------------------------------------------

_MANAGERS: list[Any] = []
"""The LoRA manager of this process, once it has loaded an adapter."""
_PLACES: dict[int, tuple[bytes, list[Any]]] = {}
"""By slot of the pool: the table of the adapter that was last in it, and where each of its matrices
goes, flat. The pool never moves."""
_UNUSED: defaultdict[bytes, list[Matrices]] = defaultdict(list)
"""By table: memory of adapters that were forgotten. To cut it up anew takes longer than to copy
what comes into it."""


@dataclass(frozen=True, slots=True)
class Matrices:
    """An adapter's matrices, where it is in use or not."""

    table: bytes
    """See `kit.weight_sync.transport.table_of`."""
    flat: Any
    """All of them one after the other, as bytes."""
    parts: tuple[Any, ...]
    """Each of them, flat."""

    @classmethod
    def of(cls, flat: Any, table: bytes) -> Matrices:
        """A copy of matrices that lie in another process' memory.

        Raises:
            ValueError: they are of several dtypes.
        """
        import torch

        if _UNUSED[table]:
            taken = _UNUSED[table].pop()
            taken.flat.copy_(flat)
            return taken
        entries = json.loads(table)
        dtypes = {dtype for _, _, dtype, *_ in entries}
        if len(dtypes) != 1:
            raise ValueError(f"the adapter is in {', '.join(sorted(dtypes))}")
        own = flat.clone()
        numbers = own.view(getattr(torch, dtypes.pop()))
        return cls(table, own, numbers.split([prod(shape) for _, shape, *_ in entries]))


def register(device: str) -> None:
    """Change this process' SGLang as the top of this module says."""
    from sglang.srt.lora.lora_manager import LoRAManager
    from sglang.srt.lora.mem_pool import LoRAMemoryPool

    if device == "cpu":
        _pin_nothing()
    else:
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        monkey_patch_torch_reductions()  # tensors name their card by its UUID
    LoRAManager.load_lora_weights_from_tensors = _load
    pool: Any = LoRAMemoryPool
    pool.load_lora_weight_to_buffer = _fill
    pool._clear_buffer_slot_for_base = _clear


def _load(manager: Any, ref: Any, tensors: dict[str, Any]) -> None:
    """Take an adapter from tensors that may lie in another process' memory."""
    import torch
    from sglang.srt.lora.lora import LoRAAdapter

    adapter = LoRAAdapter(
        ref.lora_id,
        manager.configs[ref.lora_id],
        manager.base_hf_config,
        manager.load_config,
        manager.lora_backend,
    )
    adapter.matrices = Matrices.of(tensors["flat"], tensors["table"])
    finalize(adapter, _UNUSED[adapter.matrices.table].append, adapter.matrices)
    manager.loras[ref.lora_id] = adapter
    _MANAGERS[:] = [manager]
    manager.fetch_new_loras({ref.lora_id})
    if manager.device.type == "cuda":
        torch.cuda.synchronize()  # the sender may use its memory again


def _fill(pool: Any, uid: Any, slot: int, adapter: Any, modules: list[Any], *_: Any) -> None:
    """Copy an adapter's matrices into a slot of the pool; zeros where there is no adapter.

    Raises:
        ValueError: the model has no place for one of them, or places for which there is none.
    """
    import torch

    if uid is None:
        _clear(pool, slot)
        return
    matrices: Matrices = adapter.matrices
    table, places = _PLACES.get(slot, (b"", []))
    if table != matrices.table:
        _clear(pool, slot)  # the slot had adapters of other layers
        places = _places_of(pool, slot, matrices, modules)
        _PLACES[slot] = matrices.table, places
    torch._foreach_copy_(places, matrices.parts)


def _places_of(pool: Any, slot: int, matrices: Matrices, modules: list[Any]) -> list[Any]:
    """Where an adapter's matrices go in a slot, in the order of their table, flat."""
    table = {name: tuple(shape) for name, shape, *_ in json.loads(matrices.table)}
    if matrices.parts[0].dtype != pool.dtype:
        raise ValueError(f"the adapter is in {matrices.parts[0].dtype}, the pool in {pool.dtype}")
    places = {
        name: view
        for layer, paths in enumerate(modules)
        for path in paths
        for name, view in _places(pool, path, layer, slot, table)
    }
    wrong = sorted(
        {name for name in places if tuple(places[name].shape) != table[name]}
        | (places.keys() ^ table.keys())
    )
    if wrong:
        raise ValueError(f"{len(wrong)} matrices of the adapter do not fit, {wrong[0]} for one")
    return [places[name].view(-1) for name in table]


def _places(
    pool: Any, path: str, layer: int, slot: int, table: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, Any]]:
    """Where the matrices of one of SGLang's layers lie: those of its parts one after the other."""
    parent, _, kind = path.rpartition(".")
    into_a, into_b = pool.A_buffer[kind][layer][slot], pool.B_buffer[kind][layer][slot]
    row_a = row_b = 0
    for part in SGLANG.get(kind, (kind,)):
        name_a, name_b = (f"{parent}.{part}.lora_{letter}.weight" for letter in "AB")
        if name_a not in table:  # a layer without adapter, whose zeros nobody overwrites
            continue
        a, b = table[name_a][0], table[name_b][0]
        yield name_a, into_a[row_a : row_a + a]
        yield name_b, into_b[row_b : row_b + b]
        row_a, row_b = row_a + a, row_b + b


def _clear(pool: Any, slot: int) -> None:
    """Fill a slot with zeros."""
    import torch

    buffers = (*pool.A_buffer.values(), *pool.B_buffer.values())
    torch._foreach_zero_([layer[slot] for layers in buffers for layer in layers])


def tensors_of(adapter: str) -> Iterator[tuple[str, Any]]:
    """(name of a layer's matrix, its bits in the pool) of an adapter, by SGLang's name for it."""
    for manager in _MANAGERS:
        uids = [uid for uid, ref in manager.lora_refs.items() if ref.lora_name == adapter]
        for uid in uids:
            manager.fetch_new_loras({uid})
            pool = manager.memory_pool
            slot = pool.get_buffer_id(uid)
            for layer, modules in enumerate(manager.lora_modules):
                for path in modules:
                    kind = path.rpartition(".")[2]
                    yield f"{path}.lora_A.weight", pool.A_buffer[kind][layer][slot]
                    yield f"{path}.lora_B.weight", pool.B_buffer[kind][layer][slot]


class _Unpinned(ModuleType):
    """torch without pinned memory."""

    def __getattr__(self, name: str) -> Any:
        import torch

        made = getattr(torch, name)
        if name not in ("arange", "empty", "tensor", "zeros"):
            return made
        return lambda *args, pin_memory=False, **kwargs: made(*args, **kwargs)


def _pin_nothing() -> None:
    """Have SGLang's adapters use ordinary memory."""
    import torch
    from sglang.srt.lora import layers, mem_pool
    from sglang.srt.lora.backend import base_backend, torch_backend

    for module in (layers, mem_pool, base_backend, torch_backend):
        module.torch = _Unpinned("torch")
    kind: Any = torch.Tensor
    kind.pin_memory = lambda tensor, *_: tensor
