"""Turn prompts into token ids, with the model's own chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kit.errors import DataError
from kit.samples import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool = True,
    system_prompt: str = "",
) -> list[int]:
    """Return the token ids of a prompt, ready for the model to answer.

    With the chat template, a plain string is one user message (after `system_prompt`, if any),
    chat messages are taken as they are, and the mark that opens the answer follows. Without it,
    a plain string is tokenized as it stands.

    Raises DataError where the model has no chat template or refuses the messages, and where
    messages or a system prompt are given but the template is switched off.
    """
    if apply_chat_template:
        return _render_chat(prompt, tokenizer, system_prompt)
    if not isinstance(prompt, str) or system_prompt:
        raise DataError(
            "Chat messages need the chat template, but data.apply_chat_template is false."
            if not isinstance(prompt, str)
            else "data.system_prompt needs the chat template, but data.apply_chat_template is "
            "false.",
            fix="set data.apply_chat_template: true, or write prompts as plain text with "
            "everything in it.",
        )
    return list(tokenizer(prompt)["input_ids"])


def check_fits(
    prompt_tokens: Sequence[int], context_length: int, max_response_len: int, number: int
) -> None:
    """Raise DataError if prompt and longest response exceed the context.

    `number` names the row. All lengths are in tokens.
    """
    length = len(prompt_tokens)
    if length >= context_length:
        raise DataError(
            f"Row {number}: the prompt has {length} tokens, but the context holds "
            f"{context_length}, prompt and response together.",
            fix="shorten or leave out the row, or raise model.context_length where the model "
            "allows it.",
        )
    if length + max_response_len > context_length:
        raise DataError(
            f"Row {number}: a prompt of {length} tokens and a response of up to "
            f"{max_response_len} need {length + max_response_len} tokens, but the context holds "
            f"{context_length}.",
            fix=f"set rollout.max_response_len to {context_length - length} or less, raise "
            "model.context_length where the model allows it, or leave out the row.",
        )


def _render_chat(
    prompt: str | Messages, tokenizer: PreTrainedTokenizerBase, system_prompt: str
) -> list[int]:
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise DataError(
            f"The model {tokenizer.name_or_path!r} has no chat template.",
            why="It is a base model, or its tokenizer was saved without one.",
            fix="set data.apply_chat_template: false to give it prompts as plain text.",
        )
    if isinstance(prompt, str):
        system = [{"role": "system", "content": system_prompt}] if system_prompt else []
        messages = [*system, {"role": "user", "content": prompt}]
    else:
        messages = prompt
    try:
        # Newer transformers return a mapping with an attention mask unless told not to.
        ids = tokenizer.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise DataError(
            "The model's chat template refuses the messages with roles "
            f"{', '.join(message['role'] for message in messages)}.",
            why=str(error),
            fix="change the roles; a model without system messages needs data.system_prompt empty.",
        ) from error
    return list(ids)
