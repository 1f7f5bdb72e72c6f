"""Weights reach another process whole, and leave nothing behind."""

import multiprocessing
import os
from collections.abc import Iterable

import torch

from kit.weight_sync.transport import (
    POLICY,
    BucketSpec,
    DtypeOf,
    Handle,
    ReceiveBuffer,
    SendBuffer,
    in_buckets,
)

CPU = torch.device("cpu")


def named(fill: float = 0.0) -> list[tuple[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(4)
    shapes = {"embed": (11, 8), "norm": (8,), "scale": ()}
    return [(name, torch.randn(s, generator=random) + fill) for name, s in shapes.items()]


def fill(
    buffer: SendBuffer,
    weights: Iterable[tuple[str, torch.Tensor]],
    dtype_of: DtypeOf = lambda _: torch.float32,
) -> Handle:
    """The weights in the buffer, laid out as they come."""
    tensors = list(weights)
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors]
    return buffer.fill(BucketSpec.of(POLICY, shapes, dtype_of), tensors)


def read(handle: Handle) -> dict[str, torch.Tensor]:
    """The tensors in the buffer, by the table alone."""
    flat = ReceiveBuffer().receive(handle)
    return {
        e.name: flat[e.start : e.end].view(getattr(torch, e.dtype)).view(e.shape)
        for e in handle.entries
    }


def received(handle: Handle) -> torch.Tensor:
    return ReceiveBuffer().receive(handle)


def test_another_process_reads_the_same_bytes() -> None:
    weights = named()
    handle = fill(SendBuffer(CPU), weights)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        flat = pool.apply(received, [handle])
    assert flat.numpy().tobytes() == b"".join(t.numpy().tobytes() for _, t in weights)


def test_the_table_says_where_each_tensor_lies_and_what_it_is() -> None:
    weights = dict(named())
    back = read(fill(SendBuffer(CPU), weights.items()))
    assert list(back) == list(weights)
    for name, value in weights.items():
        assert back[name].shape == value.shape
        assert torch.equal(back[name], value)


def test_weights_are_handed_over_in_the_dtype_of_the_engine() -> None:
    weights = dict(named())
    handle = fill(SendBuffer(CPU), weights.items(), lambda _: torch.bfloat16)
    assert handle.size == 2 * sum(t.numel() for t in weights.values())
    for name, value in read(handle).items():
        assert torch.equal(value, weights[name].bfloat16())


MIXED = {
    "scale": torch.randn(7, 3),
    "norm": torch.randn(5).bfloat16(),
    "quantised": torch.randint(-128, 128, (3, 5), dtype=torch.int8),
    "step": torch.tensor(3.25),
    "experts": torch.randn(9).to(torch.float8_e4m3fn),
    "bias": torch.randn(1).half(),
}
"""Sizes that leave the tensors behind them at odd places."""


def test_a_bucket_of_several_dtypes_arrives_bit_for_bit() -> None:
    handle = fill(SendBuffer(CPU), MIXED.items(), lambda name: MIXED[name].dtype)
    assert handle.size == sum(t.numel() * t.element_size() for t in MIXED.values())
    back = read(handle)
    assert back.keys() == MIXED.keys()
    for name, value in MIXED.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert torch.equal(back[name].view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))


def test_tensors_of_every_dtype_are_aligned_and_of_one_dtype_stay_in_order() -> None:
    shapes = [(name, tuple(value.shape)) for name, value in MIXED.items()]
    spec = BucketSpec.of(POLICY, shapes, lambda name: MIXED[name].dtype)
    for entry in spec.entries:
        assert entry.start % getattr(torch, entry.dtype).itemsize == 0
    alike = BucketSpec.of(POLICY, shapes, lambda _: torch.bfloat16)
    assert [entry.name for entry in alike.entries] == list(MIXED)


def test_parameters_that_train_can_be_handed_over() -> None:
    parameter = torch.nn.Parameter(torch.randn(3, 2))
    transposed = parameter.T  # its memory is not in order
    back = read(fill(SendBuffer(CPU), [("w", parameter), ("t", transposed)]))
    assert torch.equal(back["w"], parameter.detach())
    assert torch.equal(back["t"], transposed.detach())


def test_filling_again_reuses_the_buffer_and_shows_the_new_weights() -> None:
    sending = SendBuffer(CPU)
    first = fill(sending, named())
    address = sending.flat(0, first.size).data_ptr()
    held = ReceiveBuffer().receive(first)
    second = fill(sending, named(fill=1.0))
    assert sending.flat(0, second.size).data_ptr() == address
    assert second == first
    assert torch.equal(read(second)["norm"], dict(named(fill=1.0))["norm"])
    # What the engine took before is its own copy.
    assert torch.equal(held, ReceiveBuffer().receive(fill(SendBuffer(CPU), named())))


def test_what_is_received_lies_in_the_same_memory_until_its_size_changes() -> None:
    sending, receiving = SendBuffer(CPU), ReceiveBuffer()
    first = receiving.receive(fill(sending, named()))
    assert first.is_shared()
    before = first.clone()
    again = receiving.receive(fill(sending, named(fill=1.0)))
    assert again.data_ptr() == first.data_ptr()
    assert not torch.equal(again, before)
    larger = fill(sending, [*named(), ("more", torch.ones(100))])
    assert receiving.receive(larger)[-400:].view(torch.float32).tolist() == [1.0] * 100


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_nothing_with_a_name_is_left_in_shared_memory() -> None:
    sending = SendBuffer(CPU)
    handle = fill(sending, named())
    ReceiveBuffer().receive(handle)
    assert os.stat(handle.path).st_nlink == 0
    assert os.readlink(handle.path).startswith("/memfd:")


def test_a_buffer_of_another_size_takes_the_place_of_the_first() -> None:
    sending = SendBuffer(CPU)
    fill(sending, named())
    before = open_files()
    handle = fill(sending, [*named(), ("more", torch.ones(100))])
    assert open_files() == before
    assert torch.equal(read(handle)["more"], torch.ones(100))


def test_buckets_hold_every_name_once_in_order_within_their_size() -> None:
    sizes = [(f"w{i}", size) for i, size in enumerate([3, 4, 9, 1, 1, 12, 2])]
    buckets = in_buckets(sizes, 9)
    assert [name for bucket in buckets for name in bucket] == [name for name, _ in sizes]
    assert buckets == [["w0", "w1"], ["w2"], ["w3", "w4"], ["w5"], ["w6"]]
