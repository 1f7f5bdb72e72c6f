"""Gated delta networks against the rule written out, token by token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

from kit.engine.cpu import gated_delta

HEADS, VALUE_HEADS, SIZE, VALUE_SIZE, SLOTS, WIDTH = 2, 4, 8, 6, 5, 4
LENGTHS, SLOT = [70, 1, 3], [3, 0, 4]
"""One longer than a chunk of the rule; each request's slot."""
ENDS = torch.tensor([0, 70, 71, 74])


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> dict[str, torch.Tensor]:
    count = sum(LENGTHS)
    return {
        "q": drawn(1, count, HEADS, SIZE),
        "k": drawn(1, count, HEADS, SIZE, seed=1),
        "v": drawn(1, count, VALUE_HEADS, VALUE_SIZE, seed=2),
        "a": drawn(count, VALUE_HEADS, seed=3),
        "b": drawn(count, VALUE_HEADS, seed=4),
    }


A_LOG, BIAS = drawn(VALUE_HEADS, seed=5), drawn(VALUE_HEADS, seed=6)


def unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def token_by_token(given: dict[str, Any], states: torch.Tensor) -> torch.Tensor:
    """Of each head: keep a part of the state, write what it lacks of v at k, and read it at q."""
    rows = []
    for number, slot in enumerate(SLOT):
        for row in range(int(ENDS[number]), int(ENDS[number + 1])):
            out = []
            for head in range(VALUE_HEADS):
                of = head // (VALUE_HEADS // HEADS)
                q, k = (unit(given[name][0, row, of]) for name in "qk")
                rate = torch.nn.functional.softplus(given["a"][row, head] + BIAS[head])
                state = states[slot, head] * (-A_LOG[head].exp() * rate).exp()
                lacking = given["v"][0, row, head] - state @ k
                state = state + torch.outer(lacking, k) * given["b"][row, head].sigmoid()
                states[slot, head] = state
                out.append(state @ q * SIZE**-0.5)
            rows.append(torch.stack(out))
    return torch.stack(rows)[None]


def rule(given: dict[str, Any], part: slice, ends: torch.Tensor, states: torch.Tensor) -> Any:
    g, beta = gated_delta.gates(A_LOG, given["a"][part], given["b"][part], BIAS)
    q, k, v = (given[name][:, part] for name in "qkv")
    slots = torch.tensor(SLOT, dtype=torch.int32)
    return gated_delta.read(q, k, v, g, beta, states, ends, slots)[0]


def test_prompts_are_read_as_token_by_token_from_the_state_of_their_slot() -> None:
    given = inputs()
    states = drawn(SLOTS, VALUE_HEADS, VALUE_SIZE, SIZE, seed=7)
    expected_states = states.clone()
    found = rule(given, slice(None), ENDS, states)
    assert_close(found, token_by_token(given, expected_states), rtol=1e-4, atol=1e-5)
    assert_close(states, expected_states, rtol=1e-4, atol=1e-5)


def test_one_token_is_written_as_it_would_be_read() -> None:
    given = {name: x[:, :3] if x.dim() == 4 else x[:3] for name, x in inputs().items()}
    states = drawn(SLOTS, VALUE_HEADS, VALUE_SIZE, SIZE, seed=8)
    other = states.clone()
    expected = rule(given, slice(None), torch.arange(4), other)
    slots = torch.tensor(SLOT, dtype=torch.int32)
    a, b = given.pop("a"), given.pop("b")
    written = gated_delta.write(
        A_LOG, BIAS, **given, a=a, b=b, initial_state_source=states, initial_state_indices=slots
    )
    assert_close(written, expected, rtol=1e-4, atol=1e-5)
    assert_close(states, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_convolution_goes_on_from_its_slot_and_does_not_see_other_requests(
    activation: str | None, has_bias: bool
) -> None:
    channels = 3
    x, weight = drawn(channels, sum(LENGTHS)), drawn(channels, WIDTH, seed=1)
    bias = drawn(channels, seed=2) if has_bias else None
    states = drawn(SLOTS, channels, WIDTH - 1, seed=3)
    before, fresh = states.clone(), torch.tensor([True, False, True])
    slots = torch.tensor(SLOT, dtype=torch.int32)
    found = gated_delta.convolve(x, weight, bias, activation, states, fresh, slots, ENDS)
    for number, slot in enumerate(SLOT):
        own = x[:, ENDS[number] : ENDS[number + 1]]
        row = torch.cat((before[slot] * fresh[number], own), dim=1)
        for place in range(LENGTHS[number]):
            expected = (row[:, place : place + WIDTH] * weight).sum(-1)
            expected = expected if bias is None else expected + bias
            if activation:
                expected = torch.nn.functional.silu(expected)
            assert_close(found[:, ENDS[number] + place], expected)
        assert torch.equal(states[slot], row[:, -(WIDTH - 1) :])
    for slot in set(range(SLOTS)) - set(SLOT):
        assert torch.equal(states[slot], before[slot])
    token = drawn(len(SLOT), channels, seed=9)
    one = states.clone()
    single = gated_delta.convolve_one(token, one, weight, bias, activation, slots)
    again = gated_delta.convolve(
        token.T, weight, bias, activation, states, torch.ones(3), slots, torch.arange(4)
    )
    assert_close(single, again.T)
    assert torch.equal(one, states)


def test_a_gated_norm_is_that_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    norm = Qwen3NextRMSNormGated(8, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(drawn(8, seed=1))
        x, gate = drawn(5, 8, seed=2), drawn(5, 8, seed=3)
        assert_close(gated_delta.gated_norm(x, gate, norm.weight, 1e-6), norm(x, gate))
