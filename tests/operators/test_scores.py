"""Attention with soft caps and sinks against one query at a time, gradients included."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.operators import scores
from tests.cases import slow

HEADS, KEY_HEADS, SIZE, VALUE_SIZE, SCALE = 4, 2, 6, 5, 0.4
OWN, SEEN = (5, 1, 4), (5, 7, 9)
"""Two of the sequences have something before them that they share with others."""


def inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(0)

    def made(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    tensors = {
        "q": made(sum(OWN), HEADS, SIZE),
        "k": made(sum(SEEN), KEY_HEADS, SIZE),
        "v": made(sum(SEEN), KEY_HEADS, VALUE_SIZE),
        "sinks": made(HEADS),
    }
    return {name: value.requires_grad_() for name, value in tensors.items()}


def ends(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor((0, *accumulate(lengths)), dtype=torch.int32)


def one_by_one(q: Any, k: Any, v: Any, sinks: Any, window: int, cap: float) -> torch.Tensor:
    rows = []
    bounds = zip(pairwise(ends(OWN).tolist()), pairwise(ends(SEEN).tolist()), strict=True)
    for (first, last), (begin, end) in bounds:
        for row in range(first, last):
            stop = end - (last - row) + 1
            start = max(begin, stop - window) if window else begin
            for head in range(HEADS):
                of = head // (HEADS // KEY_HEADS)
                score = k[start:stop, of] @ q[row, head] * SCALE
                if cap:
                    score = cap * torch.tanh(score / cap)
                total = score.exp().sum()
                if sinks is not None:
                    total = total + sinks[head].exp()
                rows.append((score.exp() / total) @ v[start:stop, of])
    return torch.stack(rows).view(-1, HEADS, VALUE_SIZE)


@pytest.mark.parametrize("at_once", [1, 30, 1 << 20])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("cap", [0.0, 0.7])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_values_and_gradients_are_those_of_one_query_at_a_time(
    monkeypatch: pytest.MonkeyPatch, window: int, cap: float, has_sinks: bool, at_once: int
) -> None:
    monkeypatch.setattr(scores, "SCORES_AT_ONCE", at_once)
    given, other = inputs(), inputs()
    sinks = given["sinks"] if has_sinks else None
    found = scores.attend(
        given["q"], given["k"], given["v"], sinks, ends(OWN), ends(SEEN), SCALE, window, cap
    )
    own = {**other, "sinks": other["sinks"] if has_sinks else None}
    expected = one_by_one(**own, window=window, cap=cap)
    assert_close(found, expected)
    weights = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view_as(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for name, value in given.items():
        if name != "sinks" or has_sinks:
            assert_close(value.grad, other[name].grad)


def test_bfloat16_is_computed_in_float32_and_rounded_once() -> None:
    wide = {name: value.detach() for name, value in inputs(torch.bfloat16).items()}
    lens = ends(OWN), ends(SEEN)
    found = scores.attend(*wide.values(), *lens, SCALE, 3, 0.7)
    expected = scores.attend(*(x.float() for x in wide.values()), *lens, SCALE, 3, 0.7)
    assert torch.equal(found, expected.bfloat16())


@pytest.mark.parametrize(
    "kind", slow("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
)
def test_torch_knows_the_operator(kind: str) -> None:
    given = inputs(torch.float32)
    arguments = (*given.values(), ends(OWN), ends(SEEN), SCALE, 3, 0.7)
    assert torch.library.opcheck(scores.attend, arguments, test_utils=kind)[kind] == "SUCCESS"
