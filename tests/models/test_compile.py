"""What a GPU's trainer computes, traced and run on the CPU: the same numbers, compiled once.

The attention operator is torch's own on a GPU; here it gets a plain kernel for the CPU. Everything
around it is what runs there: its gradient, rows that samples share, recomputation, compiled layers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kit.models import attention, compile, moe
from kit.models.packing import Packed, pack
from kit.models.policy import Policy, load
from kit.tiny import MODEL_DIR
from tests.small_models import mixture_of_experts

CPU = torch.device("cpu")


def scores(
    q: torch.Tensor, k: torch.Tensor, scale: float, heads: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys for each query head, masked products), both (heads, ...)."""
    keys = k.repeat_interleave(heads // k.shape[1], 1).transpose(0, 1)
    products = q.transpose(0, 1) @ keys.transpose(1, 2) * scale
    asks, seen = products.shape[1:]
    distance = torch.arange(asks)[:, None] + seen - asks - torch.arange(seen)
    visible = (distance >= 0) & (distance < (window or seen))
    return keys, products.masked_fill(~visible, -1e30)


@attention.forward_op.register_kernel("cpu")
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    outs, totals, own, seen = [], [], own_ends.tolist(), seen_ends.tolist()
    assert limits.tolist() == [max(b - a for a, b in pairwise(ends)) for ends in (own, seen)]
    for i in range(len(own) - 1):
        rows, places = slice(own[i], own[i + 1]), slice(seen[i], seen[i + 1])
        _, masked = scores(q[rows], k[places], scale, q.shape[1], window)
        values = v[places].repeat_interleave(q.shape[1] // v.shape[1], 1).transpose(0, 1)
        outs.append((masked.softmax(-1) @ values).transpose(0, 1))
        totals.append(masked.logsumexp(-1))
    return torch.cat(outs).contiguous(), torch.cat(totals, 1).contiguous()


@attention.backward_op.register_kernel("cpu")
def _(
    gradient: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    total: torch.Tensor,
    own_ends: torch.Tensor,
    seen_ends: torch.Tensor,
    limits: torch.Tensor,
    scale: float,
    window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    own, seen, group = own_ends.tolist(), seen_ends.tolist(), q.shape[1] // k.shape[1]

    def folded(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(0, 1).unflatten(1, (-1, group)).sum(2)

    for i in range(len(own) - 1):
        rows, places = slice(own[i], own[i + 1]), slice(seen[i], seen[i + 1])
        keys, masked = scores(q[rows], k[places], scale, q.shape[1], window)
        values = v[places].repeat_interleave(group, 1).transpose(0, 1)
        p = (masked - total[:, rows, None]).exp()
        dp = gradient[rows].transpose(0, 1) @ values.transpose(1, 2)
        ds = p * (dp - (gradient[rows] * out[rows]).sum(-1).T[..., None]) * scale
        dq[rows] += (ds @ keys).transpose(0, 1)
        dk[places] += folded(ds.transpose(1, 2) @ q[rows].transpose(0, 1))
        dv[places] += folded(p.transpose(1, 2) @ gradient[rows].transpose(0, 1))
    return dq, dk, dv


def batch(group: int, count: int, prompt: int, response: int, *, share: bool) -> Packed:
    """Samples of random tokens, `group` of them for each prompt, of different lengths."""
    draw = torch.Generator().manual_seed(count)
    tokens, lengths = [], []
    start: list[int] = []
    for i in range(count):
        if i % group == 0:
            start = torch.randint(5, 60, (prompt,), generator=draw).tolist()
        lengths.append(response + i)
        tokens.append(start + torch.randint(5, 60, (response + i,), generator=draw).tolist())
    return pack(tokens, lengths, share=share)


BATCHES = [
    batch(3, 6, 5, 4, share=True),
    batch(3, 5, 7, 6, share=True),
    batch(2, 4, 3, 9, share=False),
    batch(2, 7, 4, 2, share=False),
]


def results(policy: Policy, packed: Packed) -> list[torch.Tensor]:
    """Log-probs, entropies and every gradient."""
    policy.zero_grad()
    with moe.replaying(packed.experts):
        logp, entropy = policy(packed, 1.0)
        (logp.sum() + 0.1 * entropy.sum()).backward()
    return [logp.detach(), entropy.detach(), *(p.grad.clone() for p in policy.parameters())]


@pytest.mark.slow
@pytest.mark.parametrize(
    "level",
    [
        "alternating",  # some layers whole, of others the feed-forward part
        "none",
        "selective",
        "full",
    ],
)
def test_compiled_layers_on_the_path_of_a_gpu_give_the_same_numbers_and_are_compiled_once(
    monkeypatch: pytest.MonkeyPatch, level: compile.Recompute
) -> None:
    from torch._dynamo.utils import counters

    expected = [results(load(str(MODEL_DIR)), packed) for packed in BATCHES]
    monkeypatch.setattr(attention, "layout", attention.gathered)
    monkeypatch.setattr(attention, "attend_on_cpu", attention.attend_on_gpu)
    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    policy = load(str(MODEL_DIR))
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    compile.compile_layers(inner.model.layers)
    for packed, values in zip(BATCHES, expected, strict=True):
        for got, wanted in zip(results(policy, packed), values, strict=True):
            assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    # Four layers and four batches: once for samples that share their prompts, once for others; and
    # each of them twice where layers are of two kinds.
    kinds = 2 if level == "alternating" else 1
    assert counters["stats"]["unique_graphs"] == 2 * kinds
    torch._dynamo.reset()


def test_grouped_rows_are_summed_in_one_pass_as_row_by_row() -> None:
    from kit.models.packing import repeat_rows, sums_of

    torch.manual_seed(0)
    rows = torch.tensor([3, 0, 3, 1, 3, 0, 5])
    share = torch.randn(7, 2, 3)

    def gradient(*sums: torch.Tensor) -> torch.Tensor:
        x = torch.ones(6, 2, 3, requires_grad=True)
        (repeat_rows(x, rows, *sums) * share).sum().backward()
        assert x.grad is not None
        return x.grad

    assert_close(gradient(*sums_of(rows, 6)), gradient())
    assert not gradient(*sums_of(rows, 6))[[2, 4]].any()  # rows that nobody takes


@pytest.mark.slow
def test_compiled_layers_follow_a_record_of_experts_and_share_their_code(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    folder = mixture_of_experts(tmp_path, num_hidden_layers=3, mlp_only_layers=[0])
    draw = np.random.default_rng(0)
    batches = [draw_experts(draw, packed) for packed in BATCHES[:2]]
    plain = with_experts(folder)
    expected = [results(plain, packed) for packed in batches]
    monkeypatch.setattr(attention, "layout", attention.gathered)
    monkeypatch.setattr(attention, "attend_on_cpu", attention.attend_on_gpu)
    torch._dynamo.reset()
    counters.clear()
    real = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **how: real(f, backend="aot_eager", **how))
    policy = with_experts(folder)
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, "selective")
    compile.compile_layers(inner.model.layers)
    for packed, values in zip(batches, expected, strict=True):
        for got, wanted in zip(results(policy, packed), values, strict=True):
            assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2  # the dense layer's, and that of the others
    without = BATCHES[2]  # its rows are not shared: another layout, and no table
    for got, wanted in zip(results(policy, without), results(plain, without), strict=True):
        assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


def with_experts(folder: Path) -> Policy:
    """A replayable policy, whose experts are computed by what can be traced on a CPU."""
    policy = load(str(folder))
    inner: Any = policy.model
    inner.set_experts_implementation("batched_mm")
    moe.make_replayable(inner)
    return policy


def draw_experts(draw: np.random.Generator, packed: Packed) -> Packed:
    """The same rows with two random experts of four in each of two layers."""
    order = draw.random((len(packed.tokens_T), 2, 4)).argsort(-1)[..., :2]
    return replace(packed, experts=moe.ExpertTable.of(torch.from_numpy(order.copy())))
