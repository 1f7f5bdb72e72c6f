"""Prompts are taken as people write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kit.config import DataConfig, SessionConfig
from kit.data import load_prompts
from kit.data.chat_template import check_variables, opening, prefill, render
from kit.data.prompts import PromptSet
from kit.errors import ConfigError, DataError
from kit.rollout.sampler import as_rows
from tests import small_models

ASKED = [{"role": "user", "content": "1+2?"}]
BEGUN = [*ASKED, {"role": "assistant", "content": "let me see:"}]
TOKENIZER = small_models.tokenizer(special=(*small_models.SPECIAL, "<think>", "</think>"))


def prompts(rows: Any, **keys: str) -> PromptSet:
    return load_prompts(DataConfig(**keys), split="train", override=rows)


@pytest.mark.parametrize(
    "written",
    [
        ASKED,
        tuple(ASKED),
        np.array(ASKED, dtype=object),
        json.dumps(ASKED),
        [{"role": "User", "content": "1+2?"}],
        [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"text": "2?"}]}],
        [{"role": "user", "content": "1+2?", "name": None}],
        [{"from": "human", "value": "1+2?"}],
        json.dumps([{"from": "user", "value": "1+2?"}]),
    ],
)
def test_a_conversation_is_understood_in_each_notation(written: Any) -> None:
    assert prompts([{"prompt": written}])[0].prompt == ASKED
    assert as_rows([written])[0].prompt == ASKED


def test_text_that_only_looks_like_a_conversation_stays_text() -> None:
    for text in ('[1, 2] has what "role"?', '[{"role": ', "[]", '["role"]'):
        assert prompts([{"prompt": text}])[0].prompt == text


def test_a_conversation_in_its_own_column_keeps_who_spoke() -> None:
    said = [("system", "Add."), ("human", "1+2?"), ("gpt", "3"), ("human", "2+2?")]
    rows = [{"conversations": [{"from": who, "value": what} for who, what in said]}]
    found = prompts(rows, input_key="conversations")[0].prompt
    assert [m["role"] for m in found] == ["system", "user", "assistant", "user"]
    assert [m["content"] for m in found] == [what for _, what in said]


def test_a_turn_that_calls_a_tool_has_no_content() -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    calling = {"role": "assistant", "content": None, "tool_calls": [call]}
    found = prompts([{"prompt": [*ASKED, calling, {"role": "tool", "content": "3"}]}])[0].prompt
    assert found[1]["content"] == ""
    assert found[1]["tool_calls"][0]["function"] == {"name": "add", "arguments": {"a": 1}}
    assert prefill(found[:2]) == ""


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (
            [{"role": "user", "content": [{"type": "image", "image": "x"}]}],
            "kind 'image', not text",
        ),
        ({"role": "user", "content": "a"}, "not a list of chat messages"),
        ("half \ud83d pair", r"half of a surrogate pair, '\\ud83d', at character 5"),
        ([{"role": "user", "content": "\ude00"}], "message 1.*half of a surrogate pair"),
        ([{"role": "assistant", "content": None}], "'content' must be text"),
    ],
)
def test_what_cannot_be_a_prompt_is_named_with_its_row(written: Any, words: str) -> None:
    with pytest.raises(DataError, match=rf"row 2 \(index 1\).*{words}"):
        prompts([{"prompt": "fine"}, {"prompt": written}])


def test_half_a_surrogate_pair_in_a_file_or_in_generate_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "whole \\ud83d\\ude00"}\n{"prompt": "half \\ud83d"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2.*surrogate"):
        load_prompts(DataConfig(source=str(file)), split="train")
    with pytest.raises(DataError, match=r"Prompt 2.*surrogate"):
        as_rows(["whole", "half \ud83d"])


# ---- the beginning of an answer -----------------------------------------------------------------


def test_an_assistants_message_at_the_end_is_continued() -> None:
    read = TOKENIZER.decode(render(BEGUN, TOKENIZER))
    assert read == "<|im_start|>user\n1+2?<|im_end|>\n<|im_start|>assistant\nlet me see:"
    empty = [*ASKED, {"role": "assistant", "content": ""}]
    assert render(empty, TOKENIZER) == render(ASKED, TOKENIZER)


@pytest.mark.parametrize(
    ("begun", "opened"),
    [
        ("let me see:", ""),
        ("<think>", "<think>"),
        ("<think>so it is", "<think>so it is"),
        ("<think>so</think>", ""),
        ("<think>so</think><answer>", "<answer>"),
    ],
)
def test_the_opening_of_a_beginning_is_its_last_open_tag(begun: str, opened: str) -> None:
    prompt = [*ASKED, {"role": "assistant", "content": begun}]
    assert opening(render(prompt, TOKENIZER), TOKENIZER, prefill(prompt)) == opened


def test_a_template_that_changes_a_beginning_says_so() -> None:
    shouting = small_models.tokenizer(
        template="{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    )
    with pytest.raises(DataError, match="leave out the assistant's message"):
        render(BEGUN, shouting)


# ---- variables of the template ------------------------------------------------------------------

THOUGHTFUL = (
    small_models.CHATML
    + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
)


def test_variables_reach_the_chat_template() -> None:
    tokenizer = small_models.tokenizer(template=THOUGHTFUL)
    for value, ends in ((True, "assistant\n"), (False, "<think></think>")):
        ids = render("1+1=", tokenizer, chat_template_kwargs={"enable_thinking": value})
        assert tokenizer.decode(ids).endswith(ends)


def test_variables_that_nobody_reads_are_refused() -> None:
    tokenizer = small_models.tokenizer(template=THOUGHTFUL)
    check_variables(tokenizer, ["enable_thinking"])
    with pytest.raises(ConfigError, match="did you mean 'enable_thinking'"):
        check_variables(tokenizer, ["enable_thnking"])
    with pytest.raises(ConfigError, match="apply_chat_template: true"):
        SessionConfig(
            data={"apply_chat_template": False, "chat_template_kwargs": {"enable_thinking": True}}
        )
    with pytest.raises(ConfigError, match="'tokenize'"):
        SessionConfig(data={"chat_template_kwargs": {"tokenize": False}})
