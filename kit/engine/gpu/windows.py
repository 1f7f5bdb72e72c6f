"""Sliding windows of SGLang's Triton attention, which are a token too short where it writes.

A window of w is the token itself and the w - 1 before it; SGLang's number is w - 1. Where a prompt
is read, that is what comes before the token. Where a token is written, it is among those that are
counted, so it sees w - 2 before it.
    relies on   layers/attention/triton_backend.py: TritonAttnBackend.sliding_window_size,
                init_forward_metadata, _update_decode_kv_buffers, init_cuda_graph_state
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def register() -> None:
    """Change this process, for all models that it makes."""
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    kind: Any = TritonAttnBackend
    kind.init_forward_metadata = _wider(
        kind.init_forward_metadata, lambda batch: batch.forward_mode.is_decode_or_idle()
    )
    for name in ("_update_decode_kv_buffers", "init_cuda_graph_state"):
        setattr(kind, name, _wider(getattr(kind, name), lambda *_: True))


def _wider(method: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
    """The method with a window of one token more, where a token is written."""

    def call(backend: Any, *args: Any, **kwargs: Any) -> Any:
        window = backend.sliding_window_size
        if not window or not writes(*args):
            return method(backend, *args, **kwargs)
        backend.sliding_window_size = window + 1
        try:
            return method(backend, *args, **kwargs)
        finally:
            backend.sliding_window_size = window

    return call
