"""SGLang reads buckets as the sender lays them out, whatever dtypes are in them."""

import pytest
import torch

from kit.weight_sync.transport import POLICY, BucketSpec, ReceiveBuffer, SendBuffer, serialize

pytestmark = pytest.mark.in_sglang

WEIGHTS = {
    "norm": torch.randn(3).bfloat16(),
    "quantised": torch.randint(-128, 128, (3, 3), dtype=torch.int8),
    "embed": torch.randn(5, 4),
    "eight_bits": torch.randn(7).to(torch.float8_e4m3fn),
}
SPEC = BucketSpec.of(
    POLICY,
    [(name, tuple(value.shape)) for name, value in WEIGHTS.items()],
    lambda name: WEIGHTS[name].dtype,
)


def test_a_bucket_of_several_dtypes_is_read_bit_for_bit() -> None:
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    handle = SendBuffer(torch.device("cpu")).fill(SPEC, WEIGHTS.items())
    flat = ReceiveBuffer().receive(handle)
    sent = MultiprocessingSerializer.deserialize(serialize(flat, handle))
    bucket = FlattenedTensorBucket(
        flattened_tensor=sent["flattened_tensor"], metadata=sent["metadata"]
    )
    back = dict(bucket.reconstruct_tensors())
    assert back.keys() == WEIGHTS.keys()
    for name, value in WEIGHTS.items():
        assert (back[name].dtype, back[name].shape) == (value.dtype, value.shape)
        assert torch.equal(back[name].view(torch.uint8), value.view(torch.uint8)), name


def test_what_is_broadcast_is_packed_as_sglang_packs_it() -> None:
    from sglang.srt.weight_sync.tensor_bucket import FlattenedTensorBucket

    buffer = SendBuffer(torch.device("cpu"), shared=False)
    buffer.fill(SPEC, WEIGHTS.items())
    theirs = FlattenedTensorBucket([(entry.name, WEIGHTS[entry.name]) for entry in SPEC.entries])
    assert torch.equal(theirs.get_flattened_tensor(), buffer.flat(0, SPEC.size))
    assert len(theirs.reconstruct_tensors()) == len(WEIGHTS)  # every offset fits its dtype
