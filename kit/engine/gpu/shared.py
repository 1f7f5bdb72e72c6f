"""SGLang on a GPU with the operators that the trainer computes with; read from SGLang 0.5.16.

For `training.true_on_policy`: what a request gets is then the same to the bit, whatever else is in
its batch, and whether it is read or written; and it is what the trainer's forward pass gives.

products      by `kit.operators.cuda`; a stack of several weights gives the bits of each
experts       by `kit.operators.cuda_experts`, in the order of their numbers
attention     FlashAttention-3 with one split, or the kit's kernel for reading and writing alike
log-probs     of logits / temperature, where SGLang takes the logarithm of a softmax; and torch's
              log_softmax, with which prompts are scored, is the kit's in this process
    relies on   layers/quantization/unquant.py: UnquantizedLinearMethod.apply,
                UnquantizedFusedMoEMethod.forward_cuda
                layers/moe/topk.py: fused_topk, -1 for rows that fill a graph up
                layers/logits_processor.py: LogitsProcessor._compute_lm_head
                layers/layernorm.py, activation.py, rotary_embedding/base.py: forward_cuda
                layers/sampler.py: Sampler.forward
                layers/logprob_processor.py: LogprobResult, _log_softmax of float32
                models/utils.py: apply_qk_norm, enable_fused_set_kv_buffer
                layers/attention/attention_registry.py: ATTENTION_BACKENDS
                layers/attention/triton_backend.py: forward_metadata, _set_kv_buffer
                layers/attention/flashattention_backend.py: num_splits
                model_executor/model_runner.py: ModelRunner.load_model
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.attention.utils import create_flashinfer_kv_indices_triton
from sglang.srt.layers import logits_processor, sampler
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.flashattention_backend import FlashAttentionBackend
from sglang.srt.layers.attention.triton_backend import KVWriteLoc, TritonAttnBackend
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.logprob_processor import LogprobResult
from sglang.srt.layers.moe import topk
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import (
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
)
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding
from sglang.srt.model_executor.model_runner import ModelRunner

from kit.engine.shared_router import fused_topk_by
from kit.memory.sizes import MOST_GRAPHS
from kit.operators import cuda as operators
from kit.operators import cuda_experts
from kit.operators.cuda_attention import attend
from kit.operators.rope import Angles, angles_of
from kit.operators.unknown import unknown

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

MOST_TRIED = 1 << 26
"""Elements of a product that is compared when the engine starts, at most."""


def apply_linear(
    self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`UnquantizedLinearMethod.apply`."""
    whole = operators.product(x, layer.weight)
    return whole if bias is None else whole + bias


def norm_forward(
    self: Any,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    post_residual_addition: torch.Tensor | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`RMSNorm.forward_cuda`; the sum with the residual is rounded before it is normed."""
    if post_residual_addition is not None:
        raise unknown("SGLang adds something after the residual")
    rows: torch.Tensor = x.reshape(-1, x.shape[-1])
    out = torch.empty_like(rows, memory_format=torch.contiguous_format)
    operators.norm_into(out, rows, self.weight, self.variance_epsilon, residual)
    if residual is not None:
        return out, residual
    return out.view(x.shape)


def qk_norm(
    q: torch.Tensor,
    k: torch.Tensor,
    q_norm: RMSNorm,
    k_norm: RMSNorm,
    head_dim: int,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_qk_norm` in one kernel, in place."""
    weights = q_norm.weight, k_norm.weight
    operators.norm_heads_into(q, k, q, k, *weights, q_norm.variance_epsilon)
    return q, k


def silu_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    """`SiluAndMul.forward_cuda`."""
    gate, up = x.chunk(2, dim=-1)
    return operators.silu(gate, up)


def lm_head_logits(
    self: Any, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: Any = None
) -> torch.Tensor:
    """`LogitsProcessor._compute_lm_head` for the vocabulary without padding."""
    weight = lm_head.weight[: self.config.vocab_size]
    return operators.product(hidden_states.to(weight.dtype), weight)


def experts_forward(self: Any, layer: Any, dispatch_output: Any) -> StandardCombineInput:
    """`UnquantizedFusedMoEMethod.forward_cuda`."""
    config = self.moe_runner_config
    if config.activation != "silu" or getattr(layer, "w13_weight_bias", None) is not None:
        raise unknown("its experts are no gated units, or have biases")
    if config.apply_router_weight_on_input or config.no_combine:
        raise unknown("SGLang weighs its experts before they compute")
    if (config.routed_scaling_factor or 1.0) != 1.0:
        raise unknown("SGLang scales what its experts give")
    weights, chosen, _ = dispatch_output.topk_output
    summed = cuda_experts.compute(
        dispatch_output.hidden_states, layer.w13_weight, layer.w2_weight, weights, chosen
    )
    return StandardCombineInput(hidden_states=summed)


class SharedFlashAttention(FlashAttentionBackend):
    """FlashAttention-3 that never splits a row's keys."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self.num_splits = 1


class SharedTritonAttention(TritonAttnBackend):
    """The kit's kernel, for what is read and for what is written."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        # As long as any batch, since graphs keep where it lies.
        most = max(self.req_to_token.shape[0], MOST_GRAPHS) + 1
        self._ends = torch.arange(most + 1, dtype=torch.int32, device=self.req_to_token.device)

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of one query a sequence."""
        if save_kv_cache:
            self._keep(k, v, layer, forward_batch)
        count, metadata = forward_batch.batch_size, self.forward_metadata
        own = self._ends[: count + 1]
        seen = metadata.kv_indptr[: count + 1], metadata.kv_indices
        return self._attend(q, layer, own, *seen, 1)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
        **_: Any,
    ) -> torch.Tensor:
        """Attention of the new tokens of each sequence."""
        if save_kv_cache:
            self._keep(k, v, layer, forward_batch)
        seen = getattr(forward_batch, "kit_seen", None)
        if seen is None:
            seen = forward_batch.kit_seen = self._seen(forward_batch)
        return self._attend(q, layer, self.forward_metadata.qo_indptr, *seen)

    def _seen(self, batch: ForwardBatch) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Ends and cache slots of what each sequence sees, and the most new tokens of one."""
        count, lens = batch.batch_size, batch.seq_lens
        ends = torch.zeros(count + 1, dtype=torch.int32, device=lens.device)
        ends[1:] = lens[:count].cumsum(0)
        slots = torch.empty(int(ends[-1]), dtype=torch.int32, device=lens.device)
        table = self.req_to_token
        create_flashinfer_kv_indices_triton[(count,)](
            table, batch.req_pool_indices, lens, ends, None, slots, table.stride(0)
        )
        return ends, slots, max(batch.extend_seq_lens_cpu)

    def _keep(
        self, k: torch.Tensor, v: torch.Tensor, layer: RadixAttention, batch: ForwardBatch
    ) -> None:
        metadata = self.forward_metadata
        place = KVWriteLoc(
            batch.out_cache_loc,
            metadata.swa_out_cache_loc,
            full_loc=metadata.out_cache_loc_full_physical,
        )
        self._set_kv_buffer(batch, layer, place, k, v, layer.k_scale, layer.v_scale)

    def _attend(
        self,
        q: torch.Tensor,
        layer: RadixAttention,
        own_ends: torch.Tensor,
        seen_ends: torch.Tensor,
        slots: torch.Tensor,
        longest: int,
    ) -> torch.Tensor:
        if (layer.sliding_window_size or -1) > -1 or layer.logit_cap:
            raise unknown("a layer of it does not attend to everything so far")
        keys, values = self.token_to_kv_pool.get_kv_buffer(layer.layer_id)
        query = q.view(-1, layer.tp_q_head_num, layer.qk_head_dim)
        ends = own_ends, seen_ends
        out, _ = attend("triton", query, keys, values, *ends, (longest, 0), layer.scaling, slots)
        return out.view(len(q), -1)


def register(model_path: str) -> None:
    """Have this process' SGLang compute with the shared operators."""
    from sglang.srt.models import utils as model_utils
    from transformers import AutoConfig

    host = angles_of(AutoConfig.from_pretrained(model_path))
    device: list[Angles] = []

    def rotary_forward(
        self: Any,
        positions: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        *further: Any,
        **named: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`RotaryEmbedding.forward_cuda` with the table of the model's configuration."""
        if any(value is not None for value in (*further, *named.values())):
            raise unknown("SGLang shifts its positions, or rotates into its cache")
        if not device:
            parts = host.cosines, host.sines
            device.append(Angles(*(part.to(query.device) for part in parts)))
        turned = device[0].cosines, device[0].sines
        rows = query.view(len(positions), -1), key.view(len(positions), -1)
        operators.rotate_into(*rows, *rows, positions, *turned)
        return query, key

    RMSNorm.forward_cuda = norm_forward
    RotaryEmbedding.forward_cuda = rotary_forward
    SiluAndMul.forward_cuda = silu_forward
    UnquantizedLinearMethod.apply = apply_linear
    UnquantizedFusedMoEMethod.forward_cuda = experts_forward
    topk.fused_topk = fused_topk_by(cuda_experts.choose)
    logits_processor.LogitsProcessor._compute_lm_head = lm_head_logits
    # Models import these two after this. The second would write keys while it rotates them.
    model_utils.apply_qk_norm = qk_norm
    model_utils.enable_fused_set_kv_buffer = lambda _: False
    sampler.Sampler.forward = reporting(sampler.Sampler.forward)
    ATTENTION_BACKENDS["fa3"] = SharedFlashAttention
    ATTENTION_BACKENDS["triton"] = SharedTritonAttention
    register_log_softmax()
    register_products()


def reporting(forward: Any) -> Any:
    """`Sampler.forward` that reports log-probs of the whole distribution at its temperature."""

    def forward_and_report(
        self: Any,
        logits_output: Any,
        sampling_info: Any,
        return_logprob: bool,
        top_logprobs_nums: list[int],
        token_ids_logprobs: list[list[int]],
        positions: torch.Tensor,
    ) -> torch.Tensor:
        wanted = top_logprobs_nums, token_ids_logprobs
        # Sampling overwrites them. They are products rounded to the model's dtype: this is exact.
        logits = logits_output.next_token_logits.to(torch.bfloat16)
        ids: torch.Tensor = forward(self, logits_output, sampling_info, False, *wanted, positions)
        if not return_logprob:
            return ids
        if any(top_logprobs_nums) or any(x is not None for x in token_ids_logprobs):
            whole = operators.log_softmax(logits, sampling_info.temperatures)
            result = self.output_logprob_processor.compute_logprobs(whole, *wanted, ids)
        else:
            chosen = operators.log_probs_of(logits, ids.long(), sampling_info.temperatures)
            result = LogprobResult(token_logprobs=chosen)
        result.write_output_to(logits_output)
        return ids

    return forward_and_report


_library: list[torch.library.Library] = []


def register_log_softmax() -> None:
    """Have torch's log_softmax on GPUs be the kit's in this process, whoever calls it."""

    def log_softmax(x: torch.Tensor, dim: int, to_float: bool) -> torch.Tensor:
        if dim not in (-1, x.dim() - 1):
            raise unknown("SGLang takes a logarithm of a softmax along another dimension")
        rows = x.reshape(-1, x.shape[-1]).to(torch.bfloat16)
        back = rows.view(x.shape).to(x.dtype)
        if not torch.equal(back.nan_to_num(), x.nan_to_num()):
            raise unknown("SGLang does something to its logits before it scores them")
        one = torch.ones(1, dtype=torch.float32, device=x.device)
        return operators.log_softmax(rows, one).view(x.shape).to(x.dtype)

    library = torch.library.Library("aten", "IMPL")
    library.impl("_log_softmax", log_softmax, "CUDA")
    _library.append(library)  # it is in force as long as it is kept


def register_products() -> None:
    """Find, once the weights are there, which products torch's library may compute."""
    load = ModelRunner.load_model

    def load_and_prove(self: Any) -> Any:
        loaded = load(self)
        weights = [p for p in self.model.parameters() if p.dim() == 2 and p.dtype is torch.bfloat16]
        shapes = {(len(weight), weight.shape[1]) for weight in weights}
        vocabulary = self.model_config.vocab_size
        shapes |= {(vocabulary, columns) for rows, columns in shapes if rows > vocabulary}
        operators.prove_products(shapes, weights[0].device, MOST_TRIED)
        torch.cuda.empty_cache()
        return loaded

    ModelRunner.load_model = load_and_prove
