"""Weights with other signs, which a start syncs to see that the engine computes with them."""

import torch

from kit.weight_sync.sender import WeightSender
from kit.weight_sync.transform import EXACT, TURNED, WeightTransform, turned
from kit.weight_sync.transport import POLICY
from kit.weight_sync.verify import Checksums, trainer_checksums


def test_every_second_number_of_a_row_and_all_of_a_vector_change_their_sign_and_nothing_else() -> (
    None
):
    matrix = torch.tensor([[1.5, -2.0, 3.0], [4.0, 5.0, -6.0]])
    assert turned(matrix).tolist() == [[1.5, 2.0, 3.0], [4.0, -5.0, -6.0]]
    assert turned(matrix[0]).tolist() == [-1.5, 2.0, -3.0]
    assert turned(matrix.expand(2, 2, 3)).tolist() == [turned(matrix).tolist()] * 2
    for value in (matrix, matrix.bfloat16(), matrix[1]):
        assert turned(value).dtype == value.dtype
        assert torch.equal(turned(turned(value)), value)


def test_a_sender_sends_other_signs_while_it_is_told_to_and_no_longer() -> None:
    weight = torch.arange(6.0).view(2, 3)
    sender = WeightSender(torch.device("cpu"), lambda _, value: value)
    sender.register(
        POLICY, lambda: iter([("w", weight)]), lambda _: torch.float32, bucket_bytes=1 << 20
    )
    sums = []
    for on in (False, True, False):
        (sender.turned.add if on else sender.turned.discard)(POLICY)
        sender.export(POLICY, 0, 0, exact=True)
        assert sender.transform(POLICY) == WeightTransform(TURNED if on else EXACT, 0)
        sums.append(sender.checksums(POLICY))
    plain, other = (trainer_checksums([("w", value)]) for value in (weight, turned(weight)))
    assert sums == [plain, other, plain]


def test_a_bfloat16_weight_that_the_engine_keeps_in_float32_is_the_trainers() -> None:
    value = torch.tensor([1.0, 1.0 + 2**-12])
    trainer = trainer_checksums([("bias", value)])
    kept = trainer_checksums([("bias", value.bfloat16().float())])["bias"]["float32"][0]
    assert Checksums.of(trainer, [{"bias": kept}], "bfloat16").require_equal() == 1
    found = Checksums.of(trainer, [{"bias": kept}], "float32")
    assert (found.different, found.rounded) == ([], ["bias"])
