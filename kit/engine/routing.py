"""The experts that SGLang reports of a request, read from its answer; SGLang 0.5.16.

SGLang keeps them by cache slot, on the host, as each forward pass wrote them. A prefix that was
found in the cache brings the record of the pass that filled it, so the cache has to be emptied with
every change of weights, which each sync does.
    relies on   state_capturer/base.py: BaseTopkCapturer.get_topk
                managers/scheduler_components/batch_result_processor.py:
                _maybe_collect_routed_experts
                managers/tokenizer_manager.py: meta_info["num_retractions"]
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.errors import StackError
from kit.models.source import ExpertLayout
from kit.samples.experts import dtype_for

if TYPE_CHECKING:
    from kit.messages import ExpertRows

AT_ODDS = "the kit reads the record of SGLang 0.5.16; report it, and train without replay meanwhile"


def routed_experts(meta: dict[str, Any], written: int, layout: ExpertLayout) -> ExpertRows | None:
    """Experts of all tokens of a request but the last, prompt included.

    Rows that SGLang does not vouch for hold the largest number of the dtype: those of the response
    where the request was retracted, because they are then of another pass than its log-probs, and
    those that nothing was ever written to.

    Args:
        meta: `meta_info` of SGLang's answer.
        written: response tokens.
        layout: the model's.

    Returns:
        (tokens - 1, layers with experts, top k); None where there is no record.

    Raises:
        StackError: the record is of another shape than the request, or names unknown experts.
    """
    if meta.get("routed_experts") is None:
        return None
    prompt = int(meta["prompt_tokens"])
    rows = max(prompt + written - 1, 0)
    numbers = np.frombuffer(base64.b64decode(meta["routed_experts"]), np.int32)
    whole = numbers.reshape(-1, layout.model_layers, layout.top_k)
    if len(whole) not in (rows, rows + 1):  # it may know of the token after a stop string
        raise StackError(
            f"The engine reports the experts of {len(whole)} tokens for a request of {rows + 1}.",
            why=f"It is request {meta.get('id')}, of {prompt} tokens and {written} written.",
            fix=AT_ODDS,
        )
    chosen = whole[:rows][:, layout.layers]
    if rows and (chosen.min() < 0 or chosen.max() >= layout.count):
        raise StackError(
            f"The engine reports experts {chosen.min()} to {chosen.max()}; a layer has "
            f"{layout.count}.",
            fix=AT_ODDS,
        )
    dtype = dtype_for(layout.count)
    told: ExpertRows = chosen.astype(dtype)
    unknown = _never_written(chosen)
    if rows and unknown.all():
        raise StackError(
            "The engine recorded no experts: every token has the same one several times.",
            why="The way in which it computes experts (moe_runner_backend) passes by the record.",
            fix="leave moe_runner_backend out of engine.extra, or set it to triton.",
        )
    if meta.get("num_retractions"):
        unknown[max(prompt - 1, 0) :] = True
    told[unknown] = np.iinfo(dtype).max
    return told


def _never_written(chosen: ExpertRows) -> Any:
    """Whether a row can be no record, since a token takes each expert once; (rows)."""
    if chosen.shape[2] < 2:
        return np.zeros(len(chosen), bool)
    ordered = np.sort(chosen, axis=2)
    return (ordered[:, :, 1:] == ordered[:, :, :-1]).any(axis=(1, 2))
