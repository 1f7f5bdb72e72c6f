"""Plans of tensor parallelism that SGLang's models of Transformers do not know, on one device.

A projection whose parts are gathered at once, or an input that is divided first, is the plain one
where there is nothing to divide.
    relies on   models/transformers.py: _normalize_tp_style
"""

from __future__ import annotations

WHOLE = {"colwise_gather_output": "colwise", "rowwise_split_input": "rowwise"}


def register(_architecture: str, _device: str) -> None:
    """Have this process take such a plan where it has one device."""
    from sglang.srt.models import transformers
    from sglang.srt.runtime_context import get_parallel

    normalize = transformers._normalize_tp_style

    def normalize_more(style: str) -> str:
        known: str = normalize(WHOLE.get(style, style) if get_parallel().tp_size == 1 else style)
        return known

    transformers._normalize_tp_style = normalize_more
