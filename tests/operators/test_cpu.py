"""A row has the same bits whatever is beside it, and the gradients are the right ones."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from kit.operators import cpu as operators
from kit.operators.rope import Angles, table_of
from tests.cases import slow

DTYPES = [torch.float32, torch.bfloat16]
CUTS = [(a, n) for a in (0, 7, 100) for n in (1, 2, 3, 5, 8, 17, 33, 64, 100, 200)]
ByRow = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_row(name: str, dtype: torch.dtype) -> tuple[ByRow, torch.Tensor]:
    """An operator as a function of rows, and rows for it."""
    size, wide = 96, 40
    weight, norm = draw(wide, size, dtype=dtype, seed=1) / 10, draw(size, dtype=dtype, seed=2)
    router = draw(6, size, dtype=dtype, seed=3)
    first, last = (draw(6, *shape, dtype=dtype, seed=4) / 10 for shape in ((48, size), (size, 24)))

    def mixture(x: torch.Tensor) -> torch.Tensor:
        logits = operators.linear(x, router)
        return operators.experts(x, first, last, *operators.route(logits, 3, normalizes=True))

    of_name: dict[str, ByRow] = {
        "mixture": mixture,
        "product": lambda x: operators.linear(x, weight, weight[:, 0]),
        "norm": lambda x: operators.rms_norm(x, norm, 1e-6),
        "norm of heads": lambda x: operators.rms_norm(x.view(len(x), 3, 32), norm[:32], 1e-6),
        "unit": lambda x: operators.silu_and_multiply(*x.chunk(2, dim=-1)),
        "log-softmax": lambda x: operators.log_softmax(operators.linear(x, weight), 0.7),
    }
    return of_name[name], draw(320, size, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "name", ["product", "norm", "norm of heads", "unit", "log-softmax", "mixture"]
)
def test_a_row_has_the_same_bits_in_every_batch(
    name: str, dtype: torch.dtype, threads: int
) -> None:
    operator, rows = by_row(name, dtype)
    whole = operator(rows)
    for start, count in CUTS[:: 4 if name == "mixture" else 1]:
        part = operator(rows[start : start + count].contiguous())
        assert torch.equal(part, whole[start : start + count]), (start, count)
    torch.set_num_threads(3 - threads)
    assert torch.equal(operator(rows), whole)


def test_a_plain_product_has_other_bits_in_other_batches() -> None:
    """What all of this is for; where it fails, tiles may have become unnecessary."""
    weight, rows = draw(384, 128, seed=1), draw(512, 128)
    whole = linear(rows, weight)
    assert any(not torch.equal(linear(rows[a : a + n], weight), whole[a : a + n]) for a, n in CUTS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [16, *slow(32, 64), 128])
def test_a_query_attends_with_the_same_bits_in_every_batch(
    size: int, dtype: torch.dtype, threads: int
) -> None:
    """Decoded alone or read with others, after a cached beginning or from the first token, beside
    longer and shorter sequences.
    """
    sequences, tokens, heads, groups = 5, 150, 4, 2
    q = draw(sequences, tokens, heads, size, dtype=dtype)
    k, v = (draw(sequences, tokens, groups, size, dtype=dtype, seed=s) for s in (1, 2))
    first = torch.zeros(sequences, dtype=torch.long)
    whole = operators.attend(q, k, v, first, size**-0.5)
    dice = random.Random(size)
    for _ in range(25):
        chosen = dice.sample(range(sequences), dice.randint(1, sequences))
        count = dice.choice([1, 1, 2, 3, 8, 20])
        starts = [dice.randrange(tokens - count) for _ in chosen]
        seen = dice.randint(max(starts) + count, tokens)
        asked = torch.stack([q[s, a : a + count] for s, a in zip(chosen, starts, strict=True)])
        part = operators.attend(
            asked, k[chosen, :seen], v[chosen, :seen], torch.tensor(starts), size**-0.5
        )
        wanted = [whole[s, a : a + count] for s, a in zip(chosen, starts, strict=True)]
        assert torch.equal(part, torch.stack(wanted))


def test_attention_is_that_of_torch() -> None:
    q, k, v = draw(3, 70, 6, 32), draw(3, 90, 2, 32, seed=1), draw(3, 90, 2, 32, seed=2)
    first = torch.tensor([0, 20, 7])
    visible = torch.arange(90) <= (first[:, None] + torch.arange(70))[:, :, None]
    right = scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)),
        attn_mask=visible[:, None],
        scale=0.2,
        enable_gqa=True,
    ).transpose(1, 2)
    torch.testing.assert_close(
        operators.attend(q, k, v, first, 0.2).double(), right, atol=1e-6, rtol=1e-5
    )


def gradients(call: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.clone().requires_grad_() for x in inputs]
    out = call(*leaves)
    weights = draw(*out.shape, seed=9).to(out.dtype)
    return list(torch.autograd.grad((out * weights).sum(), leaves))


def mixed(
    x: torch.Tensor, first: torch.Tensor, last: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Every row's two experts, by all products of all rows."""
    gate, up = torch.einsum("tk,enk->ten", x, first).chunk(2, dim=-1)
    out = torch.einsum("ten,ekn->tek", torch.nn.functional.silu(gate) * up, last)
    share = torch.zeros(len(x), 5, dtype=x.dtype).scatter(1, CHOSEN, weights)
    return (out * share[:, :, None]).sum(1)


CHOSEN = torch.stack([torch.arange(40) % 3, torch.arange(40) % 2 + 3], dim=1)
TURNS, PLACES = draw(50, 8, seed=5), torch.arange(30).flip(0) + 10
ANGLES = Angles(TURNS.cos(), TURNS.sin())
Operator = Callable[..., torch.Tensor]
PAIRS: dict[str, tuple[Operator, Operator, list[tuple[int, ...]]]] = {
    "product": (
        operators.linear,
        linear,
        [(70, 48), (20, 48), (20,)],
    ),
    "norm": (
        lambda x, w: operators.rms_norm(x, w, 1e-6),
        lambda x, w: x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w,
        [(50, 24), (24,)],
    ),
    "unit": (
        operators.silu_and_multiply,
        lambda gate, up: torch.nn.functional.silu(gate) * up,
        [(50, 24), (50, 24)],
    ),
    "rotation": (
        lambda q, k: torch.cat(operators.rotate(q, k, ANGLES, PLACES), dim=1),
        lambda q, k: torch.view_as_real(
            torch.view_as_complex(
                torch.cat([q, k], dim=1).unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()
            )
            * torch.polar(torch.ones(30, 8).to(q.dtype), TURNS[PLACES].to(q.dtype))[:, None]
        ).transpose(-1, -2).flatten(-2),
        [(30, 3, 16), (30, 2, 16)],
    ),
    "experts": (
        lambda x, a, b, w: operators.experts(x, a, b, w, CHOSEN),
        lambda x, a, b, w: mixed(x, a, b, w),
        [(40, 16), (5, 24, 16), (5, 16, 12), (40, 2)],
    ),
    "log-softmax": (
        lambda x: operators.log_softmax(x, 0.7),
        lambda x: torch.log_softmax(x / 0.7, -1),
        [(40, 60)],
    ),
    "attention": (
        lambda q, k, v: operators.attend(q, k, v, torch.tensor([0, 5]), 0.25),
        lambda q, k, v: scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)),
            attn_mask=(
                torch.arange(20) <= (torch.tensor([0, 5])[:, None] + torch.arange(15))[:, :, None]
            )[:, None],
            scale=0.25,
            enable_gqa=True,
        ).transpose(1, 2),
        [(2, 15, 4, 16), (2, 20, 2, 16), (2, 20, 2, 16)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_are_those_of_float64(name: str) -> None:
    ours, plain, shapes = PAIRS[name]
    inputs = [draw(*shape, seed=seed) for seed, shape in enumerate(shapes)]
    wide = [x.double() for x in inputs]
    torch.testing.assert_close(ours(*inputs).double(), plain(*wide), atol=1e-5, rtol=1e-5)
    for got, wanted in zip(gradients(ours, *inputs), gradients(plain, *wide), strict=True):
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)


def test_a_table_of_angles_is_transformers_own() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaled = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    for rope in ({"rope_type": "default", "rope_theta": 1e4}, scaled):
        config = LlamaConfig(
            hidden_size=64, num_attention_heads=4, max_position_embeddings=300, rope_parameters=rope
        )
        cos, sin = table_of(config)
        theirs = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(300)[None])
        for ours, whole in zip((cos, sin), theirs, strict=True):
            torch.testing.assert_close(ours, whole[0, :, :8], atol=1e-5, rtol=0)


def test_angles_that_depend_on_the_length_are_refused() -> None:
    from transformers import LlamaConfig

    config = LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(ValueError, match="dynamic"):
        table_of(config)
