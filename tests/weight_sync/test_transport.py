"""Weights reach another process whole, and leave nothing behind."""

import multiprocessing
import os

import torch

from kit.weight_sync.transport import Handle, Inbox, Outbox, in_buckets

CPU = torch.device("cpu")


def named(fill: float = 0.0) -> list[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(4)
    shapes = {"embed": (11, 8), "norm": (8,), "scale": ()}
    return [(name, torch.randn(s, generator=random) + fill) for name, s in shapes.items()]


def read(handle: Handle) -> dict[str, torch.Tensor]:
    """The tensors in the buffer, by the table alone."""
    flat = Inbox().receive(handle)
    return {
        e.name: flat[e.start : e.end].view(getattr(torch, e.dtype)).view(e.shape)
        for e in handle.entries
    }


def received(handle: Handle) -> torch.Tensor:
    return Inbox().receive(handle)


def test_another_process_reads_the_same_bytes() -> None:
    weights = named()
    handle = Outbox(CPU, torch.float32).fill(weights)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        flat = pool.apply(received, [handle])
    assert flat.numpy().tobytes() == b"".join(t.numpy().tobytes() for _, t in weights)


def test_the_table_says_where_each_tensor_lies_and_what_it_is() -> None:
    weights = dict(named())
    back = read(Outbox(CPU, torch.float32).fill(weights.items()))
    assert list(back) == list(weights)
    for name, value in weights.items():
        assert back[name].shape == value.shape
        assert torch.equal(back[name], value)


def test_weights_are_handed_over_in_the_dtype_of_the_engine() -> None:
    weights = dict(named())
    handle = Outbox(CPU, torch.bfloat16).fill(weights.items())
    assert handle.size == 2 * sum(t.numel() for t in weights.values())
    for name, value in read(handle).items():
        assert torch.equal(value, weights[name].bfloat16())


def test_parameters_that_train_can_be_handed_over() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    transposed = parameter.T  # its memory is not in order
    back = read(Outbox(CPU, torch.float32).fill([("w", parameter), ("t", transposed)]))
    assert torch.equal(back["w"], parameter.detach())
    assert torch.equal(back["t"], transposed.detach())


def test_filling_again_reuses_the_buffer_and_shows_the_new_weights() -> None:
    outbox = Outbox(CPU, torch.float32)
    first = outbox.fill(named())
    address = outbox._buffers[0].data_ptr()
    held = Inbox().receive(first)
    second = outbox.fill(named(fill=1.0))
    assert outbox._buffers[0].data_ptr() == address
    assert second == first
    assert torch.equal(read(second)["norm"], dict(named(fill=1.0))["norm"])
    # What the engine took before is its own copy.
    assert torch.equal(held, Inbox().receive(Outbox(CPU, torch.float32).fill(named())))


def test_what_is_received_lies_in_the_same_memory_until_its_size_changes() -> None:
    outbox, inbox = Outbox(CPU, torch.float32), Inbox()
    first = inbox.receive(outbox.fill(named()))
    assert first.is_shared()
    before = first.clone()
    again = inbox.receive(outbox.fill(named(fill=1.0)))
    assert again.data_ptr() == first.data_ptr()
    assert not torch.equal(again, before)
    larger = outbox.fill([*named(), ("more", torch.ones(100))])
    assert inbox.receive(larger)[-400:].view(torch.float32).tolist() == [1.0] * 100


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_with_a_name_is_left_in_shared_memory() -> None:
    outbox = Outbox(CPU, torch.float32)
    handle = outbox.fill(named())
    Inbox().receive(handle)
    assert os.stat(handle.path).st_nlink == 0
    assert os.readlink(handle.path).startswith("/memfd:")


def test_a_buffer_of_another_size_takes_the_place_of_the_first() -> None:
    outbox = Outbox(CPU, torch.float32)
    outbox.fill(named())
    before = open_files()
    handle = outbox.fill([*named(), ("more", torch.ones(100))])
    assert open_files() == before
    assert torch.equal(read(handle)["more"], torch.ones(100))


def test_buckets_hold_every_name_once_in_order_within_their_size() -> None:
    sizes = [(f"w{i}", size) for i, size in enumerate([3, 4, 9, 1, 1, 12, 2])]
    buckets = in_buckets(sizes, 9)
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in sizes]
    assert buckets == [["w0", "w1"], ["w2"], ["w3", "w4"], ["w5"], ["w6"]]
