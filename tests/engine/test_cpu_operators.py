"""The small layers against SGLang's own plain torch code."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

pytestmark = pytest.mark.in_sglang


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def norm_layer(size: int, **changes: Any) -> Any:
    plain = {
        "weight": randn(size) + 1,
        "variance_epsilon": 1e-6,
        "hidden_size": size,
        "variance_size_override": None,
        "override_orig_dtype": None,
        "cast_x_before_out_mul": False,
        "fp32_residual": False,
    }
    return SimpleNamespace(**plain | changes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"variance_size_override": 8}])
@pytest.mark.parametrize("with_residual", [True, False])
def test_the_norm_is_sglangs(dtype: torch.dtype, changes: Any, with_residual: bool) -> None:
    from kit.engine.cpu import operators

    layer = norm_layer(32, **changes)
    layer.weight = layer.weight.to(dtype)
    x, residual = (3 * randn(7, 32)).to(dtype), randn(7, 32).to(dtype)
    arguments = (x, residual) if with_residual else (x,)
    ours = operators.norm_forward(layer, *(a.clone() for a in arguments))
    theirs = operators.sglang_norm_forward(layer, *(a.clone() for a in arguments))
    assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_the_norm_leaves_its_input_as_it_is() -> None:
    from kit.engine.cpu import operators

    x, residual = randn(3, 16), randn(16, 3).T.contiguous()
    before = x.clone(), residual.clone()
    operators.norm_forward(norm_layer(16), x, residual)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize(
    "changes",
    [{}, {"is_neox_style": False}, {"rotary_dim": 8}],
    ids=["whole", "interleaved", "part"],
)
def test_the_rotation_is_sglangs(changes: dict[str, Any]) -> None:
    from sglang.srt.layers.rotary_embedding.utils import apply_rotary_emb

    from kit.engine.cpu import operators

    size = {"rotary_dim": 16, **changes}["rotary_dim"]
    angle = torch.arange(50)[:, None] * 0.7 ** torch.arange(size // 2)[None]
    layer: Any = SimpleNamespace(
        cos_sin_cache=torch.cat([angle.cos(), angle.sin()], dim=-1),
        head_size=16,
        **{"is_neox_style": True, "rotary_dim": 16, **changes},
        _apply_rotary_emb_wrapped=apply_rotary_emb,
    )
    positions = torch.tensor([0, 3, 49, 7, 7])
    query, key = randn(5, 4 * 16), randn(5, 2 * 16)
    ours = operators.rotary_forward(layer, positions, query.clone(), key.clone())
    theirs = operators.sglang_rotary_forward(layer, positions, query.clone(), key.clone())
    for one, other in zip(ours, theirs, strict=True):
        assert one.shape == other.shape
        assert_close(one, other, rtol=1e-6, atol=1e-6)


def test_a_rotation_keeps_lengths_and_turns_by_the_angle() -> None:
    from kit.engine.cpu.operators import rotate

    quarter = torch.full((1, 1), torch.pi / 2)
    turned = rotate(torch.tensor([[[3.0, 4.0]]]), quarter.cos(), quarter.sin())
    assert_close(turned, torch.tensor([[[-4.0, 3.0]]]), rtol=0, atol=1e-6)


def test_registering_changes_models_that_are_made_afterwards() -> None:
    from sglang.srt.layers.layernorm import RMSNorm
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

    from kit.engine.cpu import operators

    before = RMSNorm.forward_native, RotaryEmbedding.forward_native
    operators.register_operators()
    try:
        assert RMSNorm.forward_native is operators.norm_forward
        assert RotaryEmbedding.forward_native is operators.rotary_forward
    finally:
        RMSNorm.forward_native, RotaryEmbedding.forward_native = before
