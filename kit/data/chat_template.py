"""Turn prompts into token ids, with the model's own chat template."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from kit.errors import ConfigError, DataError, ModelError
from kit.samples import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def render(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    *,
    apply_chat_template: bool = True,
    system_prompt: str = "",
    add_bos_token: bool | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a prompt, ready for the model to answer.

    With the chat template, a plain string is one user message (after `system_prompt`, if any),
    chat messages are taken as they are, and the mark that opens the answer follows. An assistant's
    message at the end is a beginning that the model continues (a prefill). Without the template,
    a plain string is tokenized as it stands, after what the tokenizer puts in front of texts
    (`add_bos_token` overrules it) unless the text begins with that. What the tokenizer would put
    behind it, such as an end-of-sequence token, is left out: the answer is still to come.

    Raises DataError where the model has no chat template or refuses the messages, and where
    messages or a system prompt are given but the template is switched off.
    """
    if apply_chat_template:
        return _render_chat(prompt, tokenizer, system_prompt, chat_template_kwargs or {})
    if not isinstance(prompt, str) or system_prompt:
        raise DataError(
            "Chat messages need the chat template, but data.apply_chat_template is false."
            if not isinstance(prompt, str)
            else "data.system_prompt needs the chat template, but data.apply_chat_template is "
            "false.",
            fix="set data.apply_chat_template: true, or write prompts as plain text with "
            "everything in it.",
        )
    return _plain_tokens(prompt, tokenizer, add_bos_token)


def _plain_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, add_bos_token: bool | None
) -> list[int]:
    own = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    front = added_tokens(tokenizer)[0]
    if add_bos_token is not None:
        front = [*(bos if add_bos_token else []), *(t for t in front if t not in bos)]
    return own if own[: len(front)] == front else [*front, *own]


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Token ids that a tokenizer puts in front of every text, and behind it."""
    whole = list(tokenizer("a")["input_ids"])
    own = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    for start in range(len(whole) - len(own) + 1):
        if whole[start : start + len(own)] == own:
            return whole[:start], whole[start + len(own) :]
    return [], []


_OPENING = re.compile(r"(<[A-Za-z][\w:.-]*>|\[[A-Z][A-Z_]*\])\s*\Z")
_TAIL = 32
"""Tokens at the prompt's end in which a tag is looked for."""


_TAG = re.compile(r"<(/?)([A-Za-z][\w:.-]*)>")


def opening(
    prompt_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, begun: str = ""
) -> str:
    """Return the tag that a prompt ends with, such as `<think>`, and the white space after it.

    The response goes on from it, so a reward that looks for the whole block needs it. Of a prefill
    (`begun`) it is the text from the last tag on that is still open. Empty where the prompt ends
    otherwise, as with a marker of roles: `<|assistant|>`, `[/INST]`.
    """
    tags = list(_TAG.finditer(begun))
    closed = {tag[2] for tag in tags if tag[1]}
    still = [tag for tag in tags if not tag[1] and tag[2] not in closed]
    if still:
        return begun[still[-1].start() :]
    found = _OPENING.search(str(tokenizer.decode(list(prompt_tokens[-_TAIL:]))))
    markers = (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token)
    return found[0] if found and found[1] not in markers else ""


def check_tokens(
    prompt_tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, vocabulary: int, number: int
) -> None:
    """Raise ModelError if a prompt holds a token that the model's embedding does not have.

    Args:
        prompt_tokens: ids of the prompt.
        tokenizer: the one that made them.
        vocabulary: rows of the embedding; 0 where that is unknown.
        number: names the row.
    """
    largest = max(prompt_tokens, default=0)
    if not vocabulary or largest < vocabulary:
        return
    raise ModelError(
        f"Row {number}: the prompt has the token {largest} ({tokenizer.decode([largest])!r}), but "
        f"the model's embedding has {vocabulary:,} rows, 0 to {vocabulary - 1:,}.",
        why="Tokens were added to the tokenizer and not to the model, or the chat template is of "
        "another one.",
        fix="take the tokenizer that belongs to the model, or enlarge the model "
        "(model.resize_token_embeddings(len(tokenizer))) and save both into one directory.",
    )


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


def check_variables(tokenizer: PreTrainedTokenizerBase, names: Iterable[str]) -> None:
    """Raise ConfigError for a variable of `data.chat_template_kwargs` that no template reads."""
    template = str(tokenizer.chat_template or "")
    words = set(re.findall(r"[A-Za-z_]\w+", template)) | {"tools", "documents"}
    for name in names:
        if name not in words:
            near = difflib.get_close_matches(name, sorted(words), n=1, cutoff=0.75)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"data.chat_template_kwargs has {name!r}, which the model's chat template does "
                "not read.",
                fix=f"{hint}Leave it out, or take a name that session.tokenizer.chat_template has.",
            )


def prefill(prompt: str | Messages) -> str:
    """Return the beginning of the answer that a conversation ends with; "" without one."""
    if isinstance(prompt, str) or not prompt:
        return ""
    last = prompt[-1]
    begun = last["role"] == "assistant" and not last.get("tool_calls")
    return str(last["content"]) if begun else ""


def _render_chat(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    system_prompt: str,
    variables: Mapping[str, Any],
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
    begun = bool(prefill(messages))
    if not begun and messages[-1] == {"role": "assistant", "content": ""}:
        messages = messages[:-1]  # an answer that begins with nothing
    try:
        # Newer transformers return a mapping with an attention mask unless told not to.
        ids = tokenizer.apply_chat_template(
            messages,
            tokenize=True,
            add_generation_prompt=not begun,
            continue_final_message=begun,
            return_dict=False,
            **variables,
        )
    except TemplateError as error:
        raise DataError(
            "The model's chat template refuses the messages with roles "
            f"{', '.join(message['role'] for message in messages)}.",
            why=str(error),
            fix="change the roles; a model without system messages needs data.system_prompt empty.",
        ) from error
    except (ValueError, TypeError) as error:
        raise DataError(
            "The model's chat template cannot render the messages with roles "
            f"{', '.join(message['role'] for message in messages)}.",
            why=" ".join(str(error).split()),
            fix="leave out the assistant's message at the end, which the template changes."
            if begun
            else "look at what the template does with them: session.tokenizer.chat_template.",
        ) from error
    return list(ids)
