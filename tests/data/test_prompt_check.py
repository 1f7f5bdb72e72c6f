"""The first prompt is shown as tokens, and what is odd about it is said."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from kit.config import DataConfig
from kit.data.chat_template import render
from kit.data.prompt_check import look_at
from kit.data.prompts import PromptRow
from kit.reports.status import FirstPrompt
from tests import small_models

SPECIAL = (*small_models.SPECIAL, "<s>", "</s>", "<think>", "</think>")
END = frozenset({2, 4})


def adds(text: str) -> Any:
    """Makes a post-processor that adds `<s>` and `</s>` where the text has them around $A."""

    def post(inner: Any) -> Any:
        ids = [(token, inner.token_to_id(token)) for token in ("<s>", "</s>")]
        return processors.TemplateProcessing(single=text, special_tokens=ids)

    return post


def looked_at(
    prompt: Any,
    post: str = "",
    template: str | None = small_models.CHATML,
    label: Any = None,
    **settings: Any,
) -> tuple[str, FirstPrompt]:
    """(the prompt as the model gets it, what is said of it)."""
    tokenizer = small_models.tokenizer(
        special=SPECIAL,
        eos="</s>",
        bos="<s>",
        template=template,
        post=adds(post) if post else None,
    )
    data = DataConfig(**settings)
    tokens = render(
        prompt,
        tokenizer,
        apply_chat_template=data.apply_chat_template,
        system_prompt=data.system_prompt,
        add_bos_token=data.add_bos_token,
    )
    row = PromptRow(prompt, label, {}, 1)
    seen = look_at(row, tokens, tokenizer, data, END, lambda token: tokenizer.decode([token]))
    assert "".join(seen.texts) == tokenizer.decode(tokens)
    return tokenizer.decode(tokens), seen


RENDERED = "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
WITH_BOS = "{{ bos_token }}" + small_models.CHATML


@pytest.mark.parametrize(
    ("prompt", "post", "settings"),
    [
        ("1+1=", "", {}),
        ("1+1=", "<s> $A", {"apply_chat_template": False}),
        ("say <think>so</think> 1 < 2", "", {}),
        (RENDERED, "", {"apply_chat_template": False, "add_bos_token": False}),
        ([{"role": "user", "content": "1+1="}], "", {}),
        ("1+1=", "", {"apply_chat_template": False}),  # its template has no <s> either
    ],
)
def test_nothing_is_said_of_a_healthy_prompt(
    prompt: Any, post: str, settings: dict[str, Any]
) -> None:
    _, seen = looked_at(prompt, post, **settings)
    assert (seen.warnings, seen.notes) == ((), ())


@pytest.mark.parametrize("template", [WITH_BOS, None, "<s>{{ messages }}"])
def test_a_plain_prompt_without_its_bos_is_told_and_one_setting_adds_it(
    template: str | None,
) -> None:
    _, seen = looked_at("1+1=", template=template, apply_chat_template=False)
    assert len(seen.warnings) == 1
    assert "does not begin with '<s>'" in seen.warnings[0]
    assert "data.add_bos_token: true" in seen.warnings[0]
    for value, text in ((True, "<s>1+1="), (False, "1+1=")):
        read, seen = looked_at(
            "1+1=", template=template, apply_chat_template=False, add_bos_token=value
        )
        assert (read, seen.warnings) == (text, ())


@pytest.mark.parametrize("add_bos_token", [None, True])
def test_a_text_that_begins_with_bos_gets_no_second_one(add_bos_token: bool | None) -> None:
    read, seen = looked_at(
        "<s>" + RENDERED, "<s> $A", apply_chat_template=False, add_bos_token=add_bos_token
    )
    assert read == "<s>" + RENDERED
    assert seen.warnings == ()
    assert "begins with '<s>'" in seen.notes[0]


def test_a_tokenizer_that_ends_texts_with_eos_does_not_end_a_prompt() -> None:
    read, seen = looked_at("1+1=", "<s> $A </s>", apply_chat_template=False)
    assert read == "<s>1+1="
    assert seen.warnings == ()
    assert "'</s>', which was left out" in seen.notes[0]
    read, _ = looked_at("1+1=", "<s> $A </s>", apply_chat_template=False, add_bos_token=False)
    assert read == "1+1="


@pytest.mark.parametrize(
    ("prompt", "template", "mark"),
    [
        ("1+1=</s>", small_models.CHATML, "'</s>'"),
        ("1+1=", small_models.CHATML.partition("{% if add_gen")[0], "'<|im_end|>'"),
    ],
)
def test_a_prompt_that_ends_the_turn_is_told(prompt: str, template: str, mark: str) -> None:
    _, seen = looked_at(prompt, template=template, apply_chat_template=prompt == "1+1=")
    assert len(seen.warnings) == 1
    assert f"ends with {mark}" in seen.warnings[0]


@pytest.mark.parametrize(
    "prompt", [RENDERED, "a<|im_end|>", [{"role": "user", "content": "<|im_start|>user\n1+1"}]]
)
def test_a_template_on_top_of_a_rendered_prompt_is_told(prompt: Any) -> None:
    _, seen = looked_at(prompt)
    assert len(seen.warnings) == 1
    assert "<|im_" in seen.warnings[0]
    assert "data.apply_chat_template: false" in seen.warnings[0]


def test_plain_marks_of_roles_are_found_too() -> None:
    llama = "{{ bos_token }}{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
    _, seen = looked_at("[INST] 1+1 [/INST]", template=llama)
    assert "'[INST]'" in seen.warnings[0]
    assert looked_at("1+1", template=llama)[1].warnings == ()


def test_a_system_prompt_that_chats_do_not_get_is_told() -> None:
    chat = [{"role": "user", "content": "1+1="}]
    _, seen = looked_at(chat, system_prompt="Be short.")
    assert "data.system_prompt is not used" in seen.warnings[0]
    assert looked_at("1+1=", system_prompt="Be short.")[1].warnings == ()


def test_what_the_prompt_opens_is_told() -> None:
    _, seen = looked_at("1+1=", template=small_models.THINKING)
    assert seen.warnings == ()
    assert "ends in <think>" in seen.notes[0]


@pytest.mark.parametrize(
    ("begun", "warned"),
    [("the answer is 3", True), ("in 13 steps:", False), ("let me see:", False)],
)
def test_a_beginning_is_told_and_warned_of_if_it_is_the_answer(begun: str, warned: bool) -> None:
    chat = [{"role": "user", "content": "1+2?"}, {"role": "assistant", "content": begun}]
    _, seen = looked_at(chat, label="3")
    assert repr(begun) in seen.notes[0]
    assert bool(seen.warnings) == warned
    assert not warned or "holds the right answer, '3'" in seen.warnings[0]
