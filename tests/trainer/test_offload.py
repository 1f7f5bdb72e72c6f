"""A trainer's tensors leave the device and come back as they were."""

import torch
from torch import nn

from kit.trainer.offload import HostOffload

CPU = torch.device("cpu")


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    state = [x for values in optimizer.state.values() for x in values.values()]
    return [*model.parameters(), *state]


def trained() -> tuple[nn.Linear, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(3, 8)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def test_what_was_taken_has_no_memory_and_comes_back_bit_by_bit() -> None:
    model, optimizer = trained()
    everything = tensors(model, optimizer)
    before = [x.clone() for x in everything]
    offload = HostOffload(CPU)
    offload.offload(everything)
    assert offload.offloaded_bytes == sum(x.nbytes for x in before)
    assert all(x.untyped_storage().nbytes() == 0 for x in everything)
    offload.reload()
    assert offload.offloaded_bytes == 0
    for now, old in zip(everything, before, strict=True):
        assert torch.equal(now, old)


def test_training_goes_on_as_if_nothing_had_slept() -> None:
    def run(sleeps: bool) -> list[torch.Tensor]:
        model, optimizer = trained()
        offload = HostOffload(CPU)
        for _ in range(3):
            if sleeps:
                offload.offload(tensors(model, optimizer))
                offload.reload()
            model(torch.ones(3, 8)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for slept, awake in zip(run(True), run(False), strict=True):
        assert torch.equal(slept, awake)


def test_tensors_that_share_their_memory_are_taken_once() -> None:
    whole = torch.arange(12.0)
    half, view = whole[:6], whole.view(3, 4)
    offload = HostOffload(CPU)
    offload.offload([whole, half, view, whole])
    assert offload.offloaded_bytes == 48
    offload.reload()
    assert torch.equal(view, torch.arange(12.0).view(3, 4))
    assert torch.equal(half, torch.arange(6.0))


def test_the_host_memory_is_used_again() -> None:
    model, optimizer = trained()
    offload = HostOffload(CPU)
    offload.offload(tensors(model, optimizer))
    first = offload.buffer.chunks[0]
    places = [chunk.data_ptr() for chunk in offload.buffer.chunks]
    offload.reload()
    offload.offload(tensors(model, optimizer))
    assert offload.buffer.chunks[0] is first
    assert [chunk.data_ptr() for chunk in offload.buffer.chunks] == places
    offload.reload()
