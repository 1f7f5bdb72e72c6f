"""A prompt that does not fit is found before anything starts, or left out; never in step 7."""

from __future__ import annotations

from typing import Any

import pytest

from kit import SessionConfig
from kit.data.stream import PromptStream
from kit.errors import DataError, ModelError
from kit.models.source import find
from kit.rollout.sampler import PromptSampler

FINE = [{"prompt": "1+1=" * 4, "label": str(n)} for n in range(40)]
LONG = {"prompt": "1" * 60, "label": "long"}
"""As the tiny model has a token a character; with others, few characters may be many tokens."""


def sampler(rows: Any, **data: Any) -> PromptSampler:
    config = SessionConfig(
        model={"context_length": 64},
        rollout={"max_response_len": 8},
        data={"shuffle": False} | data,
    )
    made = PromptSampler.load(config, find(config.model), rows, rows)
    made.load_tokenizer()
    return made


def test_a_long_row_among_many_is_refused_at_the_start() -> None:
    rows = [*FINE[:30], LONG, *FINE[30:]]
    with pytest.raises(DataError) as caught:
        sampler(rows)
    for words in ("Row 31", "context holds 64", "data.filter_overlong_prompts: true"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match="2 of 42 training prompts do not fit"):
        sampler([*rows, LONG])


def test_long_rows_are_left_out_if_the_settings_say_so_and_that_is_told() -> None:
    rows = [*FINE[:2], LONG, *FINE[2:], LONG]
    with pytest.warns(RuntimeWarning, match=r"2 of 42 .* prompts are left out.*row 3: \d+"):
        made = sampler(rows, filter_overlong_prompts=True)
    stream = PromptStream(made.train, shuffle=False, keep=made.fits)
    drawn = [row.label for row in stream.next(len(FINE) + 1)]
    assert drawn == [row["label"] for row in [*FINE, FINE[0]]]
    assert [row.number for row in stream.peek(2)] == [2, 4]
    state = stream.state()
    other = PromptStream(made.train, shuffle=False, keep=made.fits)
    other.load_state(state)
    assert other.next(5) == stream.next(5)
    assert [row.label for row in made.held_out_rows(3)["in_memory"]] == ["0", "1", "2"]
    assert made.first_prompt is not None
    assert "left out" in made.first_prompt.warnings[0]


def test_data_of_which_nothing_fits_is_refused_in_any_case() -> None:
    for leave_out in (True, False):
        with pytest.raises(DataError, match="3 of 3 training prompts do not fit"):
            sampler([LONG] * 3, filter_overlong_prompts=leave_out)
    stream = PromptStream(sampler(FINE).train, keep=lambda row: False)
    with pytest.raises(DataError, match="None of the 40 rows can be used"):
        stream.next(1)


def test_roles_that_the_template_refuses_are_found_in_any_row() -> None:
    chats = [{"prompt": [{"role": "user", "content": "1+1="}]}] * 50
    with pytest.raises(DataError, match="wizard"):
        sampler([*chats, {"prompt": [{"role": "wizard", "content": "1"}]}, *chats])


def test_a_token_that_the_embedding_lacks_is_refused_at_the_start() -> None:
    from dataclasses import replace

    config = SessionConfig()
    model = find(config.model)
    assert model.vocabulary > 90
    made = PromptSampler.load(config, replace(model, vocabulary=5), FINE, None)
    with pytest.raises(ModelError, match=r"the model's embedding has 5 rows, 0 to 4"):
        made.load_tokenizer()
