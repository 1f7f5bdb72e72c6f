"""SGLang on a CPU with the operators that the trainer computes with; read from SGLang 0.5.16.

For `training.true_on_policy`: what a request gets is then the same to the bit, whatever else is in
its batch, and whether it is read or written; and it is what the trainer's forward pass gives.

products      of each weight by itself: a stack of several gives other bits than each of them
logits        of the vocabulary only, without the rows that SGLang pads it with
experts       by number, and the sum over a token's in that order
log-probs     log-softmax of logits / temperature, where SGLang takes the logarithm of a softmax
    relies on   layers/quantization/unquant.py: UnquantizedLinearMethod.apply
                layers/linear.py: output_partition_sizes or output_sizes of stacked weights
                layers/logits_processor.py: LogitsProcessor._compute_lm_head
                layers/sampler.py: Sampler.forward, SGLANG_RETURN_ORIGINAL_LOGPROB
                layers/activation.py: SiluAndMul.forward_native
                layers/moe/topk.py: fused_topk; fused_moe_native.py: moe_forward_native
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers import logits_processor, sampler
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.moe import fused_moe_native, topk
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from kit.engine.cpu.attention import PADDED_SCORES, BatchedCpuAttention, Slice, window_of
from kit.engine.shared_router import fused_topk_by
from kit.operators import cpu as operators
from kit.operators.rope import angles_of
from kit.operators.unknown import unknown

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


def apply_linear(
    self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`UnquantizedLinearMethod.apply`, each of the weights that lie in one by itself."""
    sizes = getattr(layer, "output_partition_sizes", None) or [len(layer.weight)]
    parts = [operators.tiled_product(x, weight) for weight in layer.weight.split(sizes)]
    whole = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
    return whole if bias is None else whole + bias


def norm_forward(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`RMSNorm.forward_native`; the sum with the residual is rounded before it is normed."""
    if post_residual_addition is not None:
        raise unknown("SGLang adds something after the residual")
    if residual is None:
        return operators.rms_norm(x, self.weight, self.variance_epsilon)
    total = x + residual
    return operators.rms_norm(total, self.weight, self.variance_epsilon), total


def silu_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """`SiluAndMul.forward_native`."""
    return operators.silu_and_multiply(*x.chunk(2, dim=-1))


def lm_head_logits(
    self: Any, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: Any = None
) -> torch.Tensor:
    """`LogitsProcessor._compute_lm_head` for the vocabulary without padding."""
    weight = lm_head.weight[: self.config.vocab_size]
    return operators.tiled_product(hidden_states.to(weight.dtype), weight)


def experts_forward(layer: Any, x: torch.Tensor, topk_output: Any, config: Any) -> torch.Tensor:
    """`moe_forward_native`."""
    if config.activation != "silu" or hasattr(layer, "w13_weight_bias"):
        raise unknown("its experts are no gated units, or have biases")
    weights, chosen, _ = topk_output
    return operators.experts(x, layer.w13_weight, layer.w2_weight, weights, chosen.long())


class SharedCpuAttention(BatchedCpuAttention):
    """`BatchedCpuAttention` with the shared operator."""

    def is_supported(self, layer: RadixAttention, sinks: torch.Tensor | None = None) -> bool:
        """Causal self-attention over everything so far; nothing else may be computed instead."""
        special = window_of(layer) or layer.logit_cap or sinks is not None
        if special or not super().is_supported(layer):
            raise unknown("a layer of it does not attend to everything so far")
        return True

    def _attend_new(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        part: Slice,
        layer: RadixAttention,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        first = part.visible[:, 0, 0].sum(-1) - 1
        k, v = keys[part.cache_slots], values[part.cache_slots]
        return operators.attend(query[part.query_rows], k, v, first, layer.scaling)

    def _attend_decoded(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        query = q.view(len(q), 1, layer.tp_q_head_num, layer.qk_head_dim)
        lens, table = forward_batch.seq_lens, self.req_to_token_pool.req_to_token
        size = max(1, PADDED_SCORES // int(lens.max()))
        outputs = []
        for start in range(0, len(q), size):
            part = slice(start, start + size)
            last = lens[part, None] - 1
            seen = torch.arange(int(last.max()) + 1)[None]
            rows = forward_batch.req_pool_indices[part, None]
            slots = table[rows, torch.minimum(seen, last)].long()
            k, v = keys[slots], values[slots]
            outputs.append(operators.attend(query[part], k, v, last[:, 0], layer.scaling))
        return torch.cat(outputs)


def register(model_path: str) -> None:
    """Have this process' SGLang compute with the shared operators."""
    from transformers import AutoConfig

    angles = angles_of(AutoConfig.from_pretrained(model_path))

    def rotary_forward(
        self: Any,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        *further: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`RotaryEmbedding.forward_native` with the table of the model's configuration."""
        if any(value is not None for value in (*further, *named.values())):
            raise unknown("SGLang shifts its positions, or rotates into its cache")
        place = positions.flatten()
        q, k = (x.reshape(len(place), -1, self.head_size) for x in (query, key))
        turned = operators.rotate(q, k, angles, place)
        return turned[0].reshape(query.shape), turned[1].reshape(key.shape)

    RMSNorm.forward_native = norm_forward
    RotaryEmbedding.forward_native = rotary_forward
    SiluAndMul.forward_native = silu_forward
    UnquantizedLinearMethod.apply = apply_linear
    logits_processor.LogitsProcessor._compute_lm_head = lm_head_logits
    ATTENTION_BACKENDS["torch_native"] = SharedCpuAttention
    topk.fused_topk = topk.fused_topk_native = fused_topk_by(operators.route)
    fused_moe_native.moe_forward_native = experts_forward
    register_log_probs()


def register_log_probs() -> None:
    """Have the sampler report log-softmax of logits / temperature, of the whole distribution."""
    forward = sampler.Sampler.forward
    sampler.SGLANG_RETURN_ORIGINAL_LOGPROB = True  # those of the logits that it is given

    def forward_scaled(
        self: Any, logits_output: Any, sampling_info: Any, *rest: Any, **named: Any
    ) -> Any:
        before = sampling_info.temperatures
        logits = logits_output.next_token_logits.float()
        logits_output.next_token_logits = logits.contiguous() / before
        sampling_info.temperatures = torch.ones_like(before)
        try:
            return forward(self, logits_output, sampling_info, *rest, **named)
        finally:
            sampling_info.temperatures = before

    sampler.Sampler.forward = forward_scaled
