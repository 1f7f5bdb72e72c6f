"""Logits that a GPU draws from in bfloat16; the change is one to SGLang, which needs no GPU."""

from __future__ import annotations

from tests.engine.interpreted import interpreted


def test_logits_stay_in_bfloat16_where_a_graph_decodes_and_are_widened_where_they_change() -> None:
    decoding, *others = interpreted("logits")
    assert decoding == ["bfloat16", "True", "True"]  # in the room of SGLang's copy
    assert others[:3] == [
        ["float32", "True", "True"],  # read
        ["float32", "True", "True"],  # verified
        ["float32", "False", "True"],  # another number of rows than the graph's
    ]
    assert others[3] == ["float32", "True", "False"]  # scaled, in SGLang's way
    assert others[4:] == [["bfloat16", "True"], ["float32", "True"], ["float32", "True"]]
