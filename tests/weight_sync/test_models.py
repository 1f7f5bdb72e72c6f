"""A sync names the model whose weights it carries, and either side refuses one it does not have."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kit.errors import StackError
from kit.weight_sync.receiver import WeightReceiver
from kit.weight_sync.sender import WeightSender
from kit.weight_sync.transport import POLICY, BucketSpec, Handle, ReceiveBuffer

CPU = torch.device("cpu")
WEIGHTS = {
    "norm": torch.randn(3),
    "embed": torch.randn(5, 4),
    "quantised": torch.randint(-128, 128, (3, 3), dtype=torch.int8),
    "eight_bits": torch.randn(7).to(torch.float8_e4m3fn),
    "head": torch.randn(2, 4).bfloat16(),
}


def sender(dtype_of: Any = lambda name: WEIGHTS[name].dtype, size: int = 1 << 30) -> WeightSender:
    sending = WeightSender(CPU, lambda _, value: value)
    sending.register(POLICY, WEIGHTS.items, dtype_of, bucket_bytes=size)
    return sending


class Recorder:
    """A loader that keeps what it is told."""

    def __init__(self) -> None:
        self.taken: list[Any] = []

    async def from_memory(self, *taken: Any, **common: Any) -> tuple[bool, str]:
        self.taken.append((*taken, common))
        return True, ""

    async def from_broadcast(self, *taken: Any, **common: Any) -> tuple[bool, str]:
        self.taken.append((*taken, common))
        return True, ""


def receiver() -> WeightReceiver:
    manager = SimpleNamespace(rid_to_state={})
    return WeightReceiver("cpu", lambda: manager, 3)


def test_each_tensor_of_a_model_is_sent_in_its_own_dtype_bit_for_bit() -> None:
    handle = sender().export(POLICY, 0, 0, exact=True)
    assert handle is not None
    assert handle.model == POLICY
    flat = ReceiveBuffer().receive(handle)
    back = {entry.name: entry.view(flat) for entry in handle.entries}
    assert back.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name


def test_buckets_are_as_large_as_the_dtypes_make_them() -> None:
    specs = sender(size=40).specs(POLICY)
    assert [spec.size for spec in specs] == [12, 80, 9 + 7 + 16]
    halves = sender(lambda _: torch.bfloat16, size=40).specs(POLICY)
    assert [spec.size for spec in halves] == [6, 40, 18 + 14, 16]


def test_models_are_sent_side_by_side_from_buffers_of_their_own() -> None:
    sending = sender()
    other = {"head": torch.ones(4)}
    sending.register("draft", other.items, lambda _: torch.float32, bucket_bytes=1 << 30)
    policy = sending.export(POLICY, 0, 1, exact=False)
    draft = sending.export("draft", 0, 2, exact=False)
    assert policy is not None
    assert draft is not None
    assert draft.model == "draft"
    assert ReceiveBuffer().receive(draft).view(torch.float32).tolist() == [1.0] * 4
    again = ReceiveBuffer().receive(policy)
    norm = next(entry for entry in policy.entries if entry.name == "norm")
    assert torch.equal(norm.view(again), WEIGHTS["norm"])
    assert (sending.transform(POLICY).version, sending.transform("draft").version) == (1, 2)


def test_a_trainer_refuses_to_send_a_model_that_it_does_not_have() -> None:
    with pytest.raises(StackError, match=r"model named 'draft'(.|\n)*those of: policy"):
        sender().export("draft", 0, 0, exact=False)


def test_an_engine_refuses_a_model_that_it_does_not_have_and_goes_on() -> None:
    receiving = receiver()
    handle, spec = Handle("draft", ()), BucketSpec("draft", ())
    for sync in (receiving.receive(handle, 4, handles=[handle]), receiving.receive(spec, 4)):
        with pytest.raises(StackError, match=r"model named 'draft'(.|\n)*those of: policy"):
            asyncio.run(sync)
    assert not receiving.receiving
    assert receiving.version == 3


def test_a_sync_that_broke_off_is_told_also_after_the_engine_went_on() -> None:
    receiving = receiver()
    receiving.register("draft", Recorder())
    first, whole = (Handle("draft", (), ipc=ipc) for ipc in (b"first", b"whole"))
    asyncio.run(receiving.receive(first, 4, handles=[first], last=False))
    receiving.resume()
    assert receiving.receiving
    asyncio.run(receiving.receive(whole, 5, handles=[whole]))
    assert not receiving.receiving


def test_a_registered_loader_gets_its_models_buckets_and_the_policy_keeps_its_version() -> None:
    receiving, loader = receiver(), Recorder()
    receiving.register("draft", loader)
    first, last = (Handle("draft", (), ipc=ipc) for ipc in (b"first", b"last"))
    asyncio.run(receiving.receive(first, 4, handles=[first], last=False))
    assert receiving.receiving
    asyncio.run(receiving.receive(last, 4, handles=[last]))
    assert not receiving.receiving
    assert receiving.version == 3
    assert [(payloads, common["flush_cache"]) for _, payloads, common in loader.taken] == [
        ([b"first"], False),
        ([b"last"], True),
    ]


def test_nothing_is_generated_between_two_models_of_one_sync() -> None:
    receiving = receiver()
    receiving.register("draft", Recorder())
    receiving.register("head", Recorder())
    first, last = (Handle(model, (), ipc=b"it") for model in ("draft", "head"))
    asyncio.run(receiving.receive(first, 4, handles=[first], others_follow=True))
    assert receiving.receiving
    asyncio.run(receiving.receive(last, 4, handles=[last]))
    assert not receiving.receiving
