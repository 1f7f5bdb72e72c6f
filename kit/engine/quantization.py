"""Linear layers with quantised weights in SGLang; read from SGLang 0.5.16.

A layer holds codes and scales, in the parameters that it was made with: syncs write into them.
SGLang has such layers too; they compute by kernels of theirs, which the trainer would need as well.

FP8 on a GPU    e4m3 times e4m3 by `kit.operators.fp8_cuda`, whose parts a trainer calls too
the others      the weights are read from their codes for each product, as the trainer does; e4m3 in
                a byte, and INT4 in int8, not packed

Weights may come as codes with their scales, which a sync sends, or plain, as the model's files
have them: those are quantised as they come, by the same functions. Of a layer that SGLang computes
in one product (q, k and v; gate and up) each part has scales of its own, as it has in the trainer,
wherever its first row comes to lie. On a GPU parts begin at multiples of 128 rows, so that these
are the blocks of the whole.
    relies on   layers/linear.py: LinearBase, which asks the quantisation for a method and hands
                `create_weights` the sizes of its parts; weight_loader(parameter, tensor, part)
                layers/quantization: QUANTIZATION_METHODS, CPU_QUANTIZATION_METHODS
                server_args.py: add_quantization_method_choices
                layers/utils/multi_platform.py: MultiPlatformOp._forward_method
                models/llama.py: load_weights, which takes `weight_scale` only by this name
                models/llama.py, qwen2.py, qwen3.py: names of norms and activations of a layer;
                what they return comes to the next linear layer as the same object
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt import server_args
from sglang.srt.layers import quantization
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig
from torch import nn

from kit.config import QuantizationConfig as Settings
from kit.engine.server_args import QUANTIZED
from kit.errors import StackError
from kit.models.low_precision import SCALE, scheme_of
from kit.operators import cpu, cuda, fp8_cuda, low_precision
from kit.operators.low_precision import BLOCK, Scheme

MOST_TRIED = 1 << 26
"""Elements of a product that is compared when the engine starts, at most."""
CODES = "kit_codes"
"""Attribute of activations with what they are quantised to, where the layer before did that."""
PARTS = {"q": 0, "k": 1, "v": 2}
"""SGLang's names of the parts of an attention's projection; those of other layers are numbers."""


class QuantizedLinear(LinearMethodBase):
    """Makes, fills and applies the weights of one linear layer."""

    def __init__(self, scheme: Scheme, *, shares_operators: bool) -> None:
        self._scheme, self._shares_operators = scheme, shares_operators

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give a layer room for codes (N, K), and for the scales of its parts in their order."""
        scheme, columns = self._scheme, input_size_per_partition
        if (columns, sum(output_partition_sizes)) != (input_size, output_size):
            raise StackError("A quantised layer cannot be divided over devices.")
        shapes = [scheme.scales_shape(rows, columns) for rows in output_partition_sizes]
        by_blocks = scheme.method == "fp8" and torch.get_default_device().type == "cuda"
        if by_blocks and any(size % BLOCK for size in (columns, *output_partition_sizes)):
            raise StackError(f"A quantised layer has parts that are no multiples of {BLOCK}.")
        own: Any = layer
        own.rows_of_parts = list(output_partition_sizes)
        own.scales_of_parts = [rows for rows, _ in shapes]
        codes = torch.zeros(output_size, columns, dtype=scheme.codes_dtype)
        scales = torch.full((sum(own.scales_of_parts), shapes[0][1]), torch.nan)
        for name, value in (("weight", codes), (SCALE, scales.to(scheme.scales_dtype))):
            parameter: Any = nn.Parameter(value, requires_grad=False)
            layer.register_parameter(name, parameter)
            parameter.weight_loader = self._loader(layer, name)

    def _loader(self, layer: Any, name: str) -> Any:
        def load(_parameter: Any, loaded: torch.Tensor, part: str | int | None = None) -> None:
            if part is None and len(layer.rows_of_parts) > 1:
                raise StackError("The parts of a quantised layer have to come one by one.")
            place = PARTS[part] if isinstance(part, str) else part or 0
            if name == SCALE:
                scales, codes = loaded, None
            elif loaded.dtype is self._scheme.codes_dtype:
                scales, codes = None, loaded
            else:  # from the model's files
                codes, scales = self._scheme.quantize(loaded.to(layer.weight.device))
            if codes is not None:
                _put(layer.weight, codes, layer.rows_of_parts, place)
            if scales is not None:
                _put(getattr(layer, SCALE), scales, layer.scales_of_parts, place)

        return load

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Find out which library may multiply this layer's codes; they stay as they are."""
        own: Any = layer
        device, shape = own.weight.device, tuple(own.weight.shape)
        if device.type == "cuda" and self._scheme.method == "fp8":
            fp8_cuda.prove_products([shape], device, MOST_TRIED, of_few=True)
        elif device.type == "cuda" and self._shares_operators:
            cuda.prove_products({shape}, device, MOST_TRIED)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Product of x (T, K) with the weights that the codes stand for."""
        if x.is_cuda and self._scheme.method == "fp8":
            own = layer.weight, getattr(layer, SCALE)
            codes = getattr(x, CODES, None) or fp8_cuda.quantize_rows(x)
            whole = fp8_cuda.product(codes, own, x.dtype)
            return whole if bias is None else whole + bias
        if x.is_cuda:
            weight = self._scheme.read(layer.weight, getattr(layer, SCALE), x.dtype)
            if not self._shares_operators:
                return nn.functional.linear(x, weight, bias)
            whole = cuda.product(x, weight)
            return whole if bias is None else whole + bias
        weights = self.weights(layer, x.dtype)
        if self._scheme.rounds_activations:
            x = low_precision.rounded_activations(x)
        if not self._shares_operators:
            return nn.functional.linear(x, torch.cat(weights), bias)
        # A stack of several weights gives other bits than each of them.
        whole = torch.cat([cpu.tiled_product(x, weight) for weight in weights], dim=-1)
        return whole if bias is None else whole + bias

    def weights(self, layer: Any, dtype: torch.dtype) -> list[torch.Tensor]:
        """The weights of each part, (N, K)."""
        codes = layer.weight.split(layer.rows_of_parts)
        scales = getattr(layer, SCALE).split(layer.scales_of_parts)
        return [self._scheme.read(*pair, dtype) for pair in zip(codes, scales, strict=True)]


def _put(parameter: torch.Tensor, loaded: torch.Tensor, sizes: list[int], place: int) -> None:
    """Copy a part's rows to where they belong. Raises StackError for ones of another form."""
    target = parameter.data.split(sizes)[place]
    if (target.shape, target.dtype) != (loaded.shape, loaded.dtype):
        raise StackError(
            f"A quantised weight of {tuple(loaded.shape)} in {loaded.dtype} came for one of "
            f"{tuple(target.shape)} in {target.dtype}."
        )
    target.copy_(loaded)


def norm_forward(
    norm: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`RMSNorm.forward_cuda` of a norm before a quantised layer; what it returns has its codes."""
    if post_residual_addition is not None or x.dim() != 2:
        raise StackError(
            "SGLang adds something after the residual, or has other rows than tokens, and a norm "
            "before a quantised layer knows neither.",
            fix="take a model of another family, or leave the quantisation out.",
        )
    out, codes = fp8_cuda.norm_and_quantize(x, norm.weight, norm.variance_epsilon, residual)
    setattr(out, CODES, codes)
    return out if residual is None else (out, residual)


def silu_forward(x: torch.Tensor) -> torch.Tensor:
    """`SiluAndMul.forward_cuda` before a quantised layer; what it returns has its codes."""
    gate, up = x.chunk(2, dim=-1)
    out, codes = fp8_cuda.silu_and_quantize(gate, up)
    setattr(out, CODES, codes)
    return out


def register_inputs() -> None:
    """Have what comes before FP8's layers on a GPU quantise its output in the same kernel."""
    from sglang.srt.model_executor.model_runner import ModelRunner

    load = ModelRunner.load_model

    def load_and_place(self: Any) -> Any:
        loaded = load(self)
        for layer in self.model.model.layers:
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm._forward_method = partial(norm_forward, norm)
            layer.mlp.act_fn._forward_method = silu_forward
        return loaded

    ModelRunner.load_model = load_and_place


def register(settings: Settings, *, shares_operators: bool) -> None:
    """Teach this process' SGLang the quantisation `QUANTIZED`, with these settings.

    With `shares_operators` products are the trainer's to the bit, for `training.true_on_policy`.
    """
    scheme = scheme_of(settings)

    class Quantization(QuantizationConfig):
        @classmethod
        def get_name(cls) -> str:
            return QUANTIZED

        @classmethod
        def get_supported_act_dtypes(cls) -> list[torch.dtype]:
            return [torch.float32, torch.bfloat16]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, _config: dict[str, Any]) -> Quantization:
            return cls()

        def get_scaled_act_names(self) -> list[str]:
            return []

        def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
            if not isinstance(layer, LinearBase):
                return None
            return QuantizedLinear(scheme, shares_operators=shares_operators)

    known: Any = quantization
    known.QUANTIZATION_METHODS[QUANTIZED] = Quantization
    known.CPU_QUANTIZATION_METHODS[QUANTIZED] = Quantization
    if QUANTIZED not in server_args.QUANTIZATION_CHOICES:
        server_args.add_quantization_method_choices([QUANTIZED])
