"""Log-probs of packed samples against plain Transformers, one sample at a time."""

from itertools import product
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.errors import ModelError
from kit.models import log_probs
from kit.models.attention import attend, layout
from kit.models.log_probs import (
    Distributions,
    forward_kl,
    rows_at_once,
    shared_token_log_probs,
    token_log_probs,
)
from kit.models.packing import pack, repeat_rows
from kit.models.policy import Policy, load
from kit.tiny import MODEL_DIR

TEMPERATURE = 0.7
SHAPES = [(5, 3), (12, 1), (2, 9), (7, 0), (1, 1), (30, 6)]
"""Prompt and response tokens of each sample."""


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load(str(MODEL_DIR))


@pytest.fixture(scope="module")
def plain() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        MODEL_DIR, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    return [torch.randint(3, 104, (p + r,), generator=random).tolist() for p, r in SHAPES]


RESPONSES = [r for _, r in SHAPES]


def by_hand(model: Any, row: list[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies of one sample's response, from a plain forward of it alone."""
    logits = model(torch.tensor([row])).logits[0] / TEMPERATURE
    logp = logits.log_softmax(-1)[len(row) - count - 1 : len(row) - 1]
    entropy = -(logp.exp() * logp).sum(-1)
    return logp[torch.arange(count), row[len(row) - count :]], entropy


def test_packed_samples_have_the_log_probs_of_each_sample_alone(
    policy: Policy, plain: Any, samples: list[list[int]]
) -> None:
    logp, entropy = policy(pack(samples, RESPONSES), TEMPERATURE)
    assert logp.dtype is torch.float32
    parts = zip(logp.split(RESPONSES), entropy.split(RESPONSES), strict=True)
    for (own_logp, own_entropy), row, count in zip(parts, samples, RESPONSES, strict=True):
        expected_logp, expected_entropy = by_hand(plain, row, count)
        assert_close(own_logp, expected_logp, rtol=1e-5, atol=1e-5)
        assert_close(own_entropy, expected_entropy, rtol=1e-5, atol=1e-5)


def test_gradients_through_the_packed_row_are_those_of_each_sample_alone(
    policy: Policy, plain: Any, samples: list[list[int]]
) -> None:
    policy.zero_grad()
    plain.zero_grad()
    share = torch.linspace(-1, 1, sum(RESPONSES))  # every token counts differently
    logp, entropy = policy(pack(samples, RESPONSES), TEMPERATURE)
    ((logp + 0.1 * entropy) * share).sum().backward()
    shares = share.split(RESPONSES)
    for row, count, own in zip(samples, RESPONSES, shares, strict=True):
        expected_logp, expected_entropy = by_hand(plain, row, count)
        ((expected_logp + 0.1 * expected_entropy) * own).sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in policy.model.named_parameters():
        grad = expected[name].grad
        assert grad.abs().max() > 1e-3
        assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2, 0, 5], [1]])
def test_neither_order_nor_company_changes_a_sample(
    policy: Policy, samples: list[list[int]], order: list[int]
) -> None:
    with torch.no_grad():
        all_together = policy(pack(samples, RESPONSES), TEMPERATURE)[0].split(RESPONSES)
        counts = [RESPONSES[i] for i in order]
        some = policy(pack([samples[i] for i in order], counts), TEMPERATURE)[0].split(counts)
    for place, part in zip(order, some, strict=True):
        assert_close(part, all_together[place], rtol=1e-6, atol=1e-5)


def test_another_sample_in_the_row_cannot_be_seen(policy: Policy, samples: list[list[int]]) -> None:
    changed = [[(t + 1) % 104 for t in samples[0]], *samples[1:]]
    with torch.no_grad():
        one, other = (
            policy(pack(rows, RESPONSES), TEMPERATURE)[0].split(RESPONSES)
            for rows in (samples, changed)
        )
    assert not torch.equal(one[0], other[0])
    for before, after in zip(one[1:], other[1:], strict=True):
        assert torch.equal(before, after)


def test_a_row_without_a_response_gives_no_log_probs(policy: Policy) -> None:
    logp, entropy = policy(pack([[5, 6, 7]], [0]), 1.0)
    assert (len(logp), len(entropy)) == (0, 0)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("at_once", [1, 104, 104 * 4, 104 * 20 - 1])
def test_log_probs_in_pieces_are_those_of_one_piece_in_value_and_gradient(
    monkeypatch: pytest.MonkeyPatch, at_once: int, cap: float | None
) -> None:
    torch.manual_seed(2)
    target = torch.randint(104, (21,))
    share = torch.randn(21, dtype=torch.float64)
    start, weight = torch.randn(21, 8).double(), torch.randn(104, 8).double()

    def run() -> list[torch.Tensor]:
        hidden, head = (x.clone().requires_grad_() for x in (start, weight))
        logp, entropy = token_log_probs(hidden, head, target, TEMPERATURE, cap)
        ((logp - 0.3 * entropy) * share).sum().backward()
        assert hidden.grad is not None
        assert head.grad is not None
        return [logp.detach(), entropy.detach(), hidden.grad, head.grad]

    whole = run()
    monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", at_once)
    assert rows_at_once(104) == max(1, at_once // 104)
    for part, expected in zip(run(), whole, strict=True):
        assert_close(part, expected, rtol=1e-5, atol=2e-6)


def capped_by_hand(
    hidden: torch.Tensor, head: torch.Tensor, target: torch.Tensor, cap: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies as the formula says, in the inputs' dtype."""
    logits = cap * torch.tanh(hidden @ head.T / cap) / TEMPERATURE
    p = logits.exp() / logits.exp().sum(-1, keepdim=True)
    return p.log().gather(-1, target[:, None])[:, 0], -(p * p.log()).sum(-1)


@pytest.mark.parametrize(
    ("form", "cap"),
    [
        *product(("whole", "pieces"), (0.5, 3.0, 30.0)),
        pytest.param("compiled", 3.0, marks=pytest.mark.slow),
    ],
)
def test_a_soft_cap_of_the_logits_is_applied_once_and_before_the_temperature(
    monkeypatch: pytest.MonkeyPatch, form: str, cap: float
) -> None:
    if form != "whole":
        monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)
        monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 104 * 4)
    if form == "compiled":  # as on a GPU
        for name in ("row_statistics", "logit_gradient"):
            compiled = torch.compile(getattr(log_probs, name), dynamic=True)
            monkeypatch.setattr(log_probs, name, compiled)
    torch.manual_seed(4)
    target, share = torch.randint(104, (9,)), torch.randn(9, dtype=torch.float64)
    start, weight = torch.randn(9, 8).double(), 2 * torch.randn(104, 8).double()
    found = []
    for way in (token_log_probs, None):
        hidden, head = (x.clone().requires_grad_() for x in (start, weight))
        if way:
            logp, entropy = way(hidden, head, target, TEMPERATURE, cap)
        else:
            logp, entropy = capped_by_hand(hidden, head, target, cap)
        ((logp - 0.3 * entropy) * share).sum().backward()
        found.append([logp.detach().double(), entropy.detach().double(), hidden.grad, head.grad])
    for part, expected in zip(*found, strict=True):
        assert_close(part, expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_soft_cap_is_exact_in_float64() -> None:
    torch.manual_seed(5)
    logits = (6 * torch.randn(5, 11, dtype=torch.float64)).requires_grad_()
    target, cap, scale = torch.randint(11, (5,)), 4.0, 1 / TEMPERATURE
    by_logp, by_entropy = torch.randn(2, 5, dtype=torch.float64)
    capped = cap * torch.tanh(logits / cap) * scale
    logp = capped.log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    chosen = logp.gather(-1, target[:, None])[:, 0]
    (chosen @ by_logp + entropy @ by_entropy).backward()
    total = capped.logsumexp(-1).detach()
    known = logits.detach(), target, total, entropy.detach(), by_logp, by_entropy
    assert_close(gradient_in_float64(*known, scale, cap), logits.grad, rtol=1e-12, atol=1e-12)


def gradient_in_float64(*arguments: Any) -> torch.Tensor:
    """`logit_gradient` without its rounding to float32."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        return log_probs.logit_gradient(*arguments)


def test_operators_shared_with_the_engine_refuse_a_soft_cap() -> None:
    hidden, head, target = torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1])
    with pytest.raises(ModelError, match="caps its logits at 15"):
        shared_token_log_probs(hidden, head, target, 1.0, 15.0)


def test_a_piece_of_logits_is_of_whole_tiles_where_it_is_that_large() -> None:
    rows = rows_at_once(151_936)
    assert rows % 256 == 0
    assert rows * 151_936 <= log_probs.LOGITS_AT_ONCE


def test_in_bfloat16_the_gradient_of_the_head_is_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(3)
    hidden, head = torch.randn(2048, 16), torch.randn(104, 16)
    target = torch.randint(104, (2048,))

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        weight = head.to(dtype, copy=True).requires_grad_()
        logp, _ = token_log_probs(hidden.to(dtype), weight, target, TEMPERATURE)
        logp.sum().backward()
        assert weight.grad is not None
        return weight.grad.double()

    exact = gradient(torch.float32)
    monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 104)  # a row at a time: 2048 terms
    error = (gradient(torch.bfloat16) - exact).norm() / exact.norm()
    assert error < 0.012  # what rounding the inputs and the result does; summed in bfloat16 0.05


def test_packed_attention_is_causal_attention_within_each_sample() -> None:
    torch.manual_seed(3)
    lengths = (4, 1, 7)
    query, key, value = (torch.randn(1, heads, 12, 6) for heads in (4, 2, 2))
    packed = layout(pack([[1] * 4, [2], [3] * 7], [0, 0, 0]), torch.device("cpu"))
    out, _ = attend(torch.nn.Module(), query, key, value, None, scaling=0.3, packed=packed)
    assert out.shape == (1, 12, 4, 6)
    first = 0
    for length in lengths:
        rows = slice(first, first + length)
        for head in range(4):
            q, k, v = query[0, head, rows], key[0, head // 2, rows], value[0, head // 2, rows]
            hidden = torch.triu(torch.full((length, length), -torch.inf), diagonal=1)
            expected = torch.softmax(q @ k.T * 0.3 + hidden, dim=-1) @ v
            assert_close(out[0, rows, head], expected, rtol=1e-5, atol=1e-5)
        first += length


GROUPS = [([5, 6, 7, 8], 3), ([9, 10, 11], 1), ([5, 6, 7, 8], 6), ([9, 10, 11], 0), ([4], 2)]
"""Prompts, some of which are shared, and response tokens."""


def test_sharing_a_prompt_changes_neither_log_probs_nor_gradients(policy: Policy) -> None:
    random = torch.Generator().manual_seed(4)
    counts = [count for _, count in GROUPS]
    rows = [p + torch.randint(3, 104, (n,), generator=random).tolist() for p, n in GROUPS]
    share = torch.linspace(-1, 1, sum(counts))
    results = []
    for shared in (True, False):
        policy.zero_grad()
        packed = pack(rows, counts, share=shared)
        assert (packed.seen_rows is not None) is shared
        logp, entropy = policy(packed, TEMPERATURE)
        ((logp + 0.1 * entropy) * share).sum().backward()
        grads = [p.grad.clone() for p in policy.parameters() if p.grad is not None]
        results.append([logp.detach(), entropy.detach(), *grads])
    assert len(results[0]) > 40
    for one, other in zip(*results, strict=True):
        assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_shared_rows_add_up_their_gradients_in_float32() -> None:
    x = torch.ones(3, 2, dtype=torch.bfloat16, requires_grad=True)
    rows = torch.tensor([0, 2] + [2] * 400)
    repeat_rows(x, rows).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [
        [1, 1],
        [0, 0],
        [400, 400],
    ]  # bfloat16 has no 401, and adding up in it stops at 256


def test_attention_without_a_layout_says_what_it_needs() -> None:
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="packed=layout"):
        attend(torch.nn.Module(), x, x, x, None)


@pytest.mark.parametrize(("temperature", "caps"), [(1.0, (None, None)), (0.7, (2.0, 1.5))])
def test_forward_kl_is_that_of_torch_in_one_piece_and_in_several_and_teaches_one_side_only(
    monkeypatch: pytest.MonkeyPatch, temperature: float, caps: tuple[float | None, float | None]
) -> None:
    draw = torch.Generator().manual_seed(2)
    # Two models of different widths, with one vocabulary.
    sizes = ((13, 24), (104, 24), (13, 8), (104, 8))
    given = [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]
    weight_R = torch.randn(13, generator=draw, dtype=torch.float64)

    def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
        return logits if cap is None else cap * torch.tanh(logits / cap)

    values = [value.clone().requires_grad_() for value in given]
    logits = [capped(h @ w.T, c) for h, w, c in zip(values[::2], values[1::2], caps, strict=True)]
    logp, logq = (torch.log_softmax(each / temperature, -1) for each in logits)
    expected_R = torch.nn.functional.kl_div(logq, logp, log_target=True, reduction="none").sum(-1)
    expected = torch.autograd.grad((expected_R * weight_R).sum(), values[2:])
    assert expected_R.min() > 0

    def found() -> tuple[torch.Tensor, ...]:
        own = [value.float().requires_grad_() for value in given]
        target, draft = (
            Distributions(*own[i : i + 2], temperature, cap)
            for i, cap in zip((0, 2), caps, strict=True)
        )
        kl_R = forward_kl(target, draft)
        assert kl_R.dtype == torch.float32
        (kl_R * weight_R.float()).sum().backward()
        assert own[0].grad is None
        assert own[1].grad is None
        assert own[2].grad is not None
        assert own[3].grad is not None
        return kl_R.detach(), own[2].grad, own[3].grad

    at_once = found()
    monkeypatch.setattr(log_probs, "KEPT_LOGITS", 0)
    monkeypatch.setattr(log_probs, "LOGITS_AT_ONCE", 104 * 2 * 4)  # four rows of both
    for kl_R, *gradients in (at_once, found()):
        assert_close(kl_R.double(), expected_R.detach(), rtol=1e-5, atol=1e-6)
        for gradient, right in zip(gradients, expected, strict=True):
            assert_close(gradient.double(), right, rtol=1e-4, atol=1e-5)
    same = Distributions(given[0], given[1], temperature)
    assert forward_kl(same, same).abs().max() < 1e-6
