"""Prompts become tokens through the model's own template, or are refused with a way out."""

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from kit.data.chat_template import check_fits, render
from kit.errors import DataError
from kit.tiny import MODEL_DIR


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def test_a_string_is_one_user_message_with_the_answer_opened(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = render("37+45=", tokenizer)
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "<|user|>37+45=<|end|><|assistant|>"


def test_the_system_prompt_goes_before_strings_and_not_before_messages(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    ids = render("1+1=", tokenizer, system_prompt="Add.")
    assert tokenizer.decode(ids) == "<|system|>Add.<|end|><|user|>1+1=<|end|><|assistant|>"
    messages = [{"role": "user", "content": "1+1="}]
    assert render(messages, tokenizer, system_prompt="Add.") == render("1+1=", tokenizer)


def test_plain_text_is_tokenized_as_it_stands_where_the_template_is_off(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert tokenizer.decode(render("1+1=", tokenizer, apply_chat_template=False)) == "1+1="
    with pytest.raises(DataError, match="apply_chat_template: true"):
        render([{"role": "user", "content": "a"}], tokenizer, apply_chat_template=False)
    with pytest.raises(DataError, match="system_prompt"):
        render("a", tokenizer, apply_chat_template=False, system_prompt="b")


def test_a_model_without_a_template_says_how_to_go_on() -> None:
    base = AutoTokenizer.from_pretrained(MODEL_DIR)
    base.chat_template = None
    with pytest.raises(DataError, match=r"data\.apply_chat_template: false"):
        render("a", base)


def test_roles_that_the_template_refuses_are_named(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(DataError, match=r"roles wizard.*\n.*Unknown role wizard"):
        render([{"role": "wizard", "content": "a"}], tokenizer)


def test_a_prompt_that_does_not_fit_names_row_lengths_and_settings() -> None:
    check_fits([1] * 10, context_length=20, max_response_len=10, number=7)
    with pytest.raises(DataError) as caught:
        check_fits([1] * 11, context_length=20, max_response_len=10, number=7)
    for words in ("Row 7", "11 tokens", "21 tokens", "holds 20", "max_response_len to 9"):
        assert words in str(caught.value)
    with pytest.raises(DataError, match=r"Row 7: the prompt has 20 tokens.*20"):
        check_fits([1] * 20, context_length=20, max_response_len=10, number=7)
