"""Windows of SGLang's Triton attention on a GPU; docs/models.md has what they compute."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("triton")


def test_where_a_token_is_written_the_window_holds_a_token_more_and_afterwards_as_many(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.layers.attention.triton_backend import TritonAttnBackend

    from kit.engine.gpu import windows

    kind: Any = TritonAttnBackend
    seen: list[tuple[str, int | None]] = []

    def look(name: str, error: bool = False) -> Any:
        def method(backend: Any, *_: Any) -> None:
            seen.append((name, backend.sliding_window_size))
            if error:
                raise ValueError("no room")

        return method

    monkeypatch.setattr(kind, "init_forward_metadata", look("metadata"))
    monkeypatch.setattr(kind, "_update_decode_kv_buffers", look("buffers"))
    monkeypatch.setattr(kind, "init_cuda_graph_state", look("room", error=True))
    windows.register()
    modes = {
        writes: SimpleNamespace(forward_mode=SimpleNamespace(is_decode_or_idle=lambda w=writes: w))
        for writes in (False, True)
    }
    for window in (None, 7):
        backend = object.__new__(kind)
        backend.sliding_window_size = window
        for batch in modes.values():
            backend.init_forward_metadata(batch)
        backend._update_decode_kv_buffers(1, None, None)
        with pytest.raises(ValueError, match="no room"):
            backend.init_cuda_graph_state(1, 1)
        assert backend.sliding_window_size == window
    without, within = seen[:4], seen[4:]
    assert {size for _, size in without} == {None}
    assert within == [("metadata", 7), ("metadata", 8), ("buffers", 8), ("room", 8)]
