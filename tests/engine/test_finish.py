"""Where a response ends, when one pass gives several tokens of it."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

pytestmark = pytest.mark.in_sglang
END = 2


def request(tokens: list[int], limit: int) -> Any:
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=limit, stop_token_ids=[END])
    sampling.normalize(None)
    made = Req("r", "", array("q", [5, 6]), sampling, vocab_size=100)
    made.output_ids = array("q", tokens)
    return made


@pytest.mark.parametrize(
    ("tokens", "new", "limit", "kept"),
    [
        ([7, 8, END, 9], 3, 4, [7, 8, END]),  # the limit is reached, past the end
        ([7, 8, END, 9, 9], 4, 4, [7, 8, END]),  # and exceeded
        ([7, END, 9, 9], 3, 8, [7, END]),  # far from it
        ([7, 8, 9, END], 3, 3, [7, 8, 9]),  # the end lies beyond it
        ([7, 8, 9], 1, 3, [7, 8, 9]),
        ([7, 8, END], 2, 3, [7, 8, END]),
    ],
)
def test_an_end_within_the_limit_ends_a_response(
    tokens: list[int], new: int, limit: int, kept: list[int]
) -> None:
    from sglang.srt.managers.schedule_batch import Req

    from kit.engine.drafts.scheduler import within_limit

    made = request(tokens, limit)
    within_limit(Req.update_finish_state)(made, new)
    assert made.finished()
    assert list(made.output_ids_through_stop) == kept
    assert list(made.output_ids) == tokens
