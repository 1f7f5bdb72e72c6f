"""Linear layers that compute with quantised weights, and the form in which these are stored and sent.

Quantised are the projections of attention and feed-forward parts; embeddings, norms and the output
layer stay as they are. The trainer keeps float32 weights and computes with what their codes stand
for (`use`); what an engine gets are the codes and their scales (`as_sent`), and files hold them in
the layouts that SGLang and Transformers read (`as_stored`): blocks of FP8 as DeepSeek-V3 publishes
them, and the `pack-quantized` format of compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from kit.config import QuantizationConfig
from kit.errors import ModelError
from kit.operators import low_precision
from kit.operators.low_precision import PER_WORD, Scheme

FAMILIES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Architectures whose every linear layer is known here."""
SCALE = "weight_scale"
"""Last part of the name of a weight's scales, as engines get them."""
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)


def scheme_of(config: QuantizationConfig | None) -> Scheme | None:
    """How weights are quantised by these settings; None for None."""
    return config and Scheme(config.method, config.numbers_a_scale)


def is_quantized(name: str) -> bool:
    """Whether the weight of this name, in a model or its files, is one of those."""
    return _QUANTIZED.fullmatch(name) is not None


def check_model(
    architecture: str, shapes: Iterable[tuple[str, tuple[int, ...]]], config: QuantizationConfig
) -> None:
    """Refuse a model that cannot be quantised so.

    Args:
        architecture: of its config.json.
        shapes: (name, shape) of its weights.
        config: how.

    Raises:
        ModelError: its layers are not known, or a group size does not divide a row of one.
    """
    if architecture not in FAMILIES:
        raise ModelError(
            f"{architecture} is not quantised here.",
            why=f"Which of its weights an engine quantises is known of {', '.join(FAMILIES)} only.",
            fix="take one of these, or leave the quantisation out.",
        )
    group = config.numbers_a_scale
    for name, shape in shapes:
        if config.method != "int4" or not is_quantized(name):
            continue
        if shape[1] % group or shape[1] % PER_WORD:
            why = f"{shape[1]} numbers a row"
            raise ModelError(
                f"{name} has {why}, which groups of {group} do not divide.",
                why=f"INT4 has a scale for each group, and {PER_WORD} codes in a word.",
                fix=f"set group_size to a divisor of {shape[1]}, such as "
                f"{_divisor(shape[1], group)}, or quantise to fp8.",
            )


def _divisor(size: int, below: int) -> int:
    """The largest divisor of a size that is a power of two and at most so much."""
    power = size & -size
    while power > below:
        power //= 2
    return power


# ---- in the trainer ----------------------------------------------------------------------------


class _Rounded:
    """A linear layer that multiplies with what the codes of its weight stand for."""

    weight: torch.Tensor
    scheme: Scheme
    product: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.scheme.rounds_activations:
            x = low_precision.rounded_activations(x)
        weight = low_precision.rounded_weight(self.weight, self.scheme.group, x.dtype)
        product: torch.Tensor = self.product(x, weight)
        return product


class _RoundedPlain(_Rounded):
    """One whose products are torch's own."""

    bias: torch.Tensor | None

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight, self.bias)


@cache
def _rounded(kind: Any) -> Any:
    """Subclass that rounds. One class for all layers shares compiled code."""
    mixin = _Rounded if hasattr(kind, "product") else _RoundedPlain
    return type(f"Rounded{kind.__name__}", (mixin, kind), {})


def use(model: nn.Module, scheme: Scheme) -> None:
    """Have a causal language model compute with quantised weights, and train through them.

    Args:
        model: a Transformers model of one of `FAMILIES`, with its weights as they are kept.
        scheme: how they are quantised as they are used.
    """
    for name, module in model.named_modules():
        if is_quantized(f"{name}.weight"):
            layer: Any = module
            layer.__class__ = _rounded(layer.__class__)
            layer.scheme = scheme


# ---- on the way to engines, and in files -------------------------------------------------------


def as_sent(
    name: str, weight: torch.Tensor, scheme: Scheme
) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight as a quantised engine gets it: codes under its name, then scales; others as they are.

    Args:
        name: of the weight.
        weight: it, whole; on the meta device for names, shapes and dtypes.
        scheme: how it is quantised.

    Raises:
        ModelError: some of its numbers are not finite.
    """
    if not is_quantized(name):
        yield name, weight
        return
    codes, scales = scheme.quantize(weight)
    if not (scales.is_meta or bool(scales.isfinite().all())):
        raise ModelError(
            f"{name} has numbers that are not finite, and cannot be quantised.",
            fix="go back to weights that are: session.undo(), or an earlier checkpoint.",
        )
    yield name, codes
    yield f"{name.removesuffix('weight')}{SCALE}", scales


def sent_dtype(name: str, scheme: Scheme | None) -> torch.dtype | None:
    """Dtype of what `as_sent` yields under this name; None where it is the weight itself."""
    if scheme is None:
        return None
    if is_quantized(name):
        return scheme.codes_dtype
    if name.endswith(f".{SCALE}"):
        return scheme.scales_dtype
    return None


def as_stored(
    name: str, weight: torch.Tensor, scheme: Scheme
) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight as files hold it; see `as_sent`, whose errors it raises.

    FP8: `weight` in e4m3 and `weight_scale_inv`. INT4: `weight_packed`, `weight_scale`, and
    `weight_shape`, which is (N, K).
    """
    parts = list(as_sent(name, weight, scheme))
    if len(parts) == 1:
        yield parts[0]
        return
    (_, codes), (_, scales) = parts
    path = name.removesuffix(".weight")
    if scheme.method == "fp8":
        yield name, codes
        yield f"{path}.weight_scale_inv", scales
    else:
        yield f"{path}.weight_packed", low_precision.pack_int4(codes)
        yield f"{path}.weight_scale", scales
        yield f"{path}.weight_shape", torch.tensor(codes.shape)


def config_entry(scheme: Scheme) -> dict[str, Any]:
    """The `quantization_config` of a config.json for such files."""
    if scheme.method == "fp8":
        return {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [low_precision.BLOCK, low_precision.BLOCK],
            "modules_to_not_convert": ["lm_head"],
        }
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": scheme.group_size,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
