"""Linear layers that compute with quantised weights, and the form in which these are sent and kept.

Quantised are the projections of attention and feed-forward parts; embeddings, norms and the output
layer stay as they are. The trainer keeps float32 weights and computes with what their codes stand
for (`use`); what an engine gets are the codes and their scales (`as_sent`), and files hold them in
the layouts that SGLang and Transformers read (`as_stored`): blocks of FP8 as DeepSeek-V3 publishes
them, and the `pack-quantized` format of compressed-tensors.
"""

from __future__ import annotations

import re
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.config import QuantizationConfig, SessionConfig
from kit.errors import ConfigError, ModelError
from kit.models import families
from kit.models.compile import hold_shapes
from kit.models.source import ModelSource, stored_shapes
from kit.operators import fp8_cuda, fp8_linear, low_precision
from kit.operators.low_precision import BLOCK, PER_WORD, Scheme
from kit.utils.hardware import Card
from kit.utils.reading import read_json

ROUNDED_CACHE = "kit_rounded_cache"
"""Name of an attention whose keys and values are rounded; see `register_rounded_cache`."""
MOST_TRIED = 1 << 29
"""Elements of a product that the trainer compares, at most: micro-batches are larger than what an
engine computes at once."""
SCALE = "weight_scale"
"""Last part of the name of a weight's scales, as engines get them."""
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
)


def scheme_of(config: QuantizationConfig) -> Scheme:
    """How weights are quantised by these settings."""
    return Scheme(config.method, config.numbers_a_scale)


def is_quantized(name: str) -> bool:
    """Whether the weight of this name, in a model or its files, is one of those."""
    return _QUANTIZED.fullmatch(name) is not None


def check_session(config: SessionConfig, model: ModelSource, device: str) -> None:
    """Refuse what cannot be quantised; warn of an engine that rounds and nothing corrects for.

    Raises:
        ConfigError: see `check_gpu`.
        ModelError: the model's files are quantised; see also `check_gpu` and `check_model`.
    """
    _check_files(model)
    _warn_of_the_uncorrected(config)
    if config.quantization is None:
        return
    check_model(model, config.quantization)
    if device != "cpu":
        card = Card.gpu()
        check_gpu(config, model, fp8_cuda.HOPPER if card is None else card.capability)
        _warn_of_bits(config)


def check_gpu(config: SessionConfig, model: ModelSource, capability: tuple[int, int]) -> None:
    """Refuse what was never run with quantised weights on a GPU.

    Args:
        config: the session's settings, with a quantisation.
        model: whose weights are quantised.
        capability: the GPU's compute capability.

    Raises:
        ConfigError: several trainers; another GPU than Hopper; another dtype than bfloat16.
        ModelError: FP8, and the size of a linear layer is no multiple of 128.
    """
    name = "model.quantization" if config.model.quantization else "engine.quantization"
    assert config.quantization is not None
    number = ".".join(map(str, capability))
    refused = {
        f"{name} is set, and training.num_trainers is {config.training.num_trainers}": (
            config.training.num_trainers > 1
        ),
        f"{name} is set, and model.dtype is {config.model.dtype}": config.model.dtype == "float32",
        f"{name} is set, and the GPU has compute capability {number}": capability
        != fp8_cuda.HOPPER,
    }
    for what, applies in refused.items():
        if applies:
            raise ConfigError(
                f"{what}.",
                why="On GPUs quantised weights were run in bfloat16 on one Hopper card (compute "
                "capability 9.0), whose tensor cores the kernels of FP8 are written for.",
                fix=f"leave {name} out, or set device: cpu.",
            )
    if config.quantization.method != "fp8":
        return
    for weight, shape in stored_shapes(Path(model.path)).items():
        if is_quantized(weight) and any(size % BLOCK for size in shape):
            raise ModelError(
                f"{weight} is {shape[0]} x {shape[1]}, and on a GPU blocks of FP8 are {BLOCK} x "
                f"{BLOCK}.",
                why="The kernels take whole blocks only, and of layers that the engine computes in "
                "one product (q, k and v; gate and up) each part has to begin with one.",
                fix=f"take a model whose sizes are multiples of {BLOCK}, or set device: cpu.",
            )


def _warn_of_the_uncorrected(config: SessionConfig) -> None:
    engine = config.engine
    if not engine.rounds_alone or config.training.corrects_for_engine:
        return
    what = "engine.quantization gives the engine other weights than the trainer's"
    if not engine.quantization:
        what = "engine.kv_cache_dtype rounds the engine's keys and values, and not the trainer's"
    warnings.warn(
        f"{what}, and training.use_tis is off: the policy that writes the samples is not the one "
        "that is trained, and nothing weighs by the difference. Leave training.use_tis out to have "
        "it on.",
        stacklevel=6,
    )


def _warn_of_bits(config: SessionConfig) -> None:
    how = config.model.quantization
    if how and how.method == "fp8" and not config.training.true_on_policy:
        warnings.warn(
            "model.quantization is fp8, and training.true_on_policy is off: trainer and engine "
            "multiply the same codes, but what else they compute differs in last bits, and where "
            "such a bit decides how an activation is rounded it counts as a whole step of FP8. "
            "With training.true_on_policy nothing differs.",
            stacklevel=6,
        )


def register_rounded_cache() -> None:
    """Register attention with Transformers that rounds keys and values to FP8, as a cache does.

    Else it is the model's own eager attention.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

    AttentionInterface.register(ROUNDED_CACHE, _attend_to_rounded)
    AttentionMaskInterface.register(ROUNDED_CACHE, ALL_MASK_ATTENTION_FUNCTIONS["eager"])


def _attend_to_rounded(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *further: Any,
    **named: Any,
) -> Any:  # fmt: skip
    eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    k, v = (x.to(torch.float8_e4m3fn).to(x.dtype) for x in (key, value))
    return eager(module, query, k, v, *further, **named)


def check_model(model: ModelSource, config: QuantizationConfig) -> None:
    """Refuse a model that cannot be quantised so.

    Raises:
        ModelError: its layers are not known, it is quantised already, or a group size does not
            divide the inputs of a layer.
    """
    if not families.find(model.architecture).quantizes:
        known = [family.architecture for family in families.all_families() if family.quantizes]
        raise ModelError(
            f"{model.architecture} is not quantised here.",
            why=f"Which of its weights an engine quantises is known of {', '.join(known)} only.",
            fix="take one of these, or leave the quantisation out.",
        )
    _check_files(model)
    if config.method == "int4":
        for name, shape in stored_shapes(Path(model.path)).items():
            if is_quantized(name):
                _check_row(name, shape[1], config.numbers_a_scale)


def _check_files(model: ModelSource) -> None:
    """Raise ModelError for files with quantised weights."""
    if read_json(Path(model.path) / "config.json", unique=False).get("quantization_config"):
        raise ModelError(
            f"{model.path} holds a model that is quantised already.",
            why="Neither the trainer nor a sync reads its weights.",
            fix="take the model that it was made from; model.quantization and engine.quantization "
            "quantise it as it is loaded.",
        )


def _check_row(name: str, size: int, group: int) -> None:
    """Raise ModelError where groups of so many do not divide a row, or words of 8 codes."""
    if size % PER_WORD:
        raise ModelError(
            f"{name} has {size} numbers a row, which is no multiple of {PER_WORD}.",
            why=f"INT4 has {PER_WORD} codes in a word.",
            fix="quantise to fp8.",
        )
    if size % group:
        raise ModelError(
            f"{name} has {size} numbers a row, which groups of {group} do not divide.",
            why="INT4 has a scale for each group.",
            fix=f"set the group size to a divisor of {size}, such as {_divisor(size, group)}, or "
            "quantise to fp8.",
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
    bias: torch.Tensor | None
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

    def product(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, weight, self.bias)


class _Multiplied:
    """A linear layer on a GPU: the codes of layers with one input are multiplied in one.

    The first that is called computes for all, and the others have their part of it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    together: tuple[Any, ...]
    """The layers with this one's input, of which the first is called first; itself among them."""
    codes: torch.Tensor | None
    scales: torch.Tensor | None
    """Of the weights of all, in the first one."""
    most: int
    """For how many rows torch's library multiplies them."""
    part: torch.Tensor | None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(self.together) == 1:
            (part,) = products(self.together, x)
            return part if self.bias is None else part + self.bias
        if self.part is None:
            parts = products(self.together, x)
            for layer, part in zip(self.together, parts, strict=True):
                layer.part = part
        own: Any = self.part
        self.part = None
        return own if self.bias is None else own + self.bias  # type: ignore[no-any-return]


class _FeedForward:
    """A feed-forward part on a GPU, where recomputation lets no layer leave another something."""

    gate_proj: Any
    down_proj: Any
    act_fn: Any

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        both: list[Any] = list(self.gate_proj.together)
        gate, up = (
            part if layer.bias is None else part + layer.bias
            for layer, part in zip(both, products(both, x), strict=True)
        )
        operators = getattr(self, "operators", None)
        inner = operators.silu_and_multiply(gate, up) if operators else self.act_fn(gate) * up
        out: torch.Tensor = self.down_proj(inner)
        return out


def products(together: Sequence[Any], x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Products of x (..., K) with the weights of layers, of whose codes the first has all."""
    first = together[0]
    weights = [layer.weight for layer in together]
    whole = fp8_linear.linear(x, weights, (first.codes, first.scales), first.most)
    parts: tuple[torch.Tensor, ...] = whole.split([n.shape[0] for n in weights], dim=-1)
    return parts


@cache
def _mixed(mixin: Any, kind: Any) -> Any:
    """Subclass that computes so. One class for all layers shares compiled code."""
    return type(f"Quantized{kind.__name__}", (mixin, kind), {})


def use(model: nn.Module, scheme: Scheme, gpu: torch.device | None = None) -> None:
    """Have a causal language model compute with quantised weights, and train through them.

    Args:
        model: a Transformers model of a family that `quantizes`, with its weights as they are kept.
        scheme: how they are quantised as they are used.
        gpu: where the codes themselves are multiplied, as the engine does it there; None multiplies
            what they stand for.
    """
    named: dict[str, Any] = dict(model.named_modules())
    layers = {name: named[name] for name in named if is_quantized(f"{name}.weight")}
    if gpu is None:
        for layer in layers.values():
            plain = _Rounded if hasattr(type(layer), "product") else _RoundedPlain
            layer.__class__ = _mixed(plain, layer.__class__)
            layer.scheme = scheme
        return
    groups = _together(layers)
    for group in groups:
        for layer in group:
            layer.__class__ = _mixed(_Multiplied, layer.__class__)
            layer.together, layer.codes, layer.scales, layer.part = group, None, None, None
    for name, part in named.items():
        if f"{name}.gate_proj" in layers:
            part.__class__ = _mixed(_FeedForward, part.__class__)
    shapes = [(sum(n.out_features for n in group), group[0].in_features) for group in groups]
    fp8_cuda.prove_products({*shapes}, gpu, MOST_TRIED)
    for group, shape in zip(groups, shapes, strict=True):
        group[0].most = fp8_cuda.PROVEN[shape]
    inner: Any = model
    inner.model.register_forward_pre_hook(lambda *_: _hold_codes(groups))


def _together(layers: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """Layers by their input: q, k and v; gate and up; each other by itself."""
    groups: dict[str, list[Any]] = {}
    for name, layer in layers.items():
        first = re.sub(r"[kv]_proj$", "q_proj", name).replace("up_proj", "gate_proj")
        groups.setdefault(first, []).append(layer)
    return [tuple(group) for group in groups.values()]


_HOLDING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Layers that hold codes of their weights, of all models."""


def _hold_codes(groups: list[tuple[Any, ...]]) -> None:
    """Quantise weights before a pass, unless the passes since `drop_codes` have done it."""
    if groups[0][0].codes is not None:
        return
    with torch.no_grad():
        made = fp8_cuda.quantize_all([[layer.weight for layer in group] for group in groups])
    for (first, *_), (codes, scales) in zip(groups, made, strict=True):
        hold_shapes(codes, scales)
        first.codes, first.scales = codes, scales
        _HOLDING.add(first)


def drop_codes() -> None:
    """Free the codes that this process' trainer computes with; has to follow each step of weights.

    Passes between two steps share them, and so do forward passes and their recomputation.
    """
    for first in _HOLDING:
        first.codes = first.scales = None
        for layer in first.together:
            layer.part = None
    _HOLDING.clear()


# ---- on the way to engines, and in files -------------------------------------------------------


def as_sent(name: str, weight: torch.Tensor, scheme: Scheme) -> Iterator[tuple[str, torch.Tensor]]:
    """A weight as a quantised engine gets it: codes under its name, then scales; others unchanged.

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


def config_entry(config: QuantizationConfig) -> dict[str, Any]:
    """The `quantization_config` of a config.json for such files."""
    if config.method == "fp8":
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
        "group_size": config.numbers_a_scale,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
