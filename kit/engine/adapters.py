"""Adapters of SGLang's own: what an engine is told of them, and what is changed in SGLang for them.

An adapter has another name at each version. SGLang keys its prefixes by the adapter that computed
them, so none is taken over from one version to the next.

Read from SGLang 0.5.16, and changed in its scheduler:
    lora/lora_manager.py    load_lora_weights_from_tensors: takes each tensor through host memory,
                            and copies to the device when the first request comes. Ours keeps a copy
                            where it is, and fills the adapter's place in the pool at once.
    managers/tp_worker.py   load_lora_adapter_from_tensors: opens memory of another process without
                            having torch name cards as the sender does.
    lora/*, on a CPU        tensors in pinned memory, which takes a GPU.
"""

from __future__ import annotations

from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from kit.errors import StackError
from kit.models.adapters import FUSED


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

    async def from_memory(
        self, manager: Any, payloads: list[bytes], **common: Any
    ) -> tuple[bool, str]:
        """Load a version of an adapter, and forget the one before.

        Of `common` it reads `adapter`, which one it is, and `weight_version`.
        """
        from sglang.srt.managers.io_struct import LoadLoRAAdapterFromTensorsReqInput

        adapter = common["adapter"]
        name = f"{adapter}:{common['weight_version']}"
        old = self.names.get(adapter)
        if old == name:  # the same weights once more: a sync was made again
            await self.unload(manager, adapter)
            old = None
        payload: Any = payloads[0]
        request = LoadLoRAAdapterFromTensorsReqInput(
            lora_name=name,
            config_dict=self._settings.peft_config,
            serialized_tensors=payload,
            load_format="flattened_bucket",
        )
        answer = await manager.load_lora_adapter_from_tensors(request)
        if not answer.success:
            return False, str(answer.error_message)
        if old:
            await self.unload(manager, adapter)
        self.names[adapter] = name
        return True, ""

    async def unload(self, manager: Any, adapter: str) -> None:
        """Forget an adapter, if it is there, once nothing is written under it.

        Raises:
            StackError: SGLang keeps it.
        """
        from sglang.srt.managers.io_struct import UnloadLoRAAdapterReqInput

        name = self.names.pop(adapter, None)
        if name is None:
            return
        answer = await manager.unload_lora_adapter(UnloadLoRAAdapterReqInput(lora_name=name))
        if not answer.success:
            raise StackError("The engine kept an old adapter.", why=str(answer.error_message))

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


# ---- in SGLang's scheduler ---------------------------------------------------------------------

_MANAGERS: list[Any] = []
"""The LoRA manager of this process, once it has loaded an adapter."""


def register(device: str) -> None:
    """Change this process' SGLang as the top of this module says."""
    from sglang.srt.lora.lora_manager import LoRAManager

    if device == "cpu":
        _pin_nothing()
    else:
        from sglang.srt.utils.patch_torch import monkey_patch_torch_reductions

        monkey_patch_torch_reductions()  # tensors name their card by its UUID
    LoRAManager.load_lora_weights_from_tensors = _load


def _load(manager: Any, ref: Any, tensors: dict[str, Any]) -> None:
    """Take an adapter from tensors that may lie in another process' memory."""
    import torch
    from sglang.srt.layers.utils import get_layer_id
    from sglang.srt.lora.lora import LoRAAdapter

    adapter = LoRAAdapter(
        ref.lora_id,
        manager.configs[ref.lora_id],
        manager.base_hf_config,
        manager.load_config,
        manager.lora_backend,
        base_model=manager.base_model,
    )
    for name, tensor in tensors.items():
        adapter.layers[get_layer_id(name)].weights[name] = tensor.clone()
    adapter._normalize_weights()
    manager.loras[ref.lora_id] = adapter
    manager.fetch_new_loras({ref.lora_id})
    _MANAGERS[:] = [manager]
    if manager.device.type == "cuda":
        torch.cuda.synchronize()  # the sender may use its memory again


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
