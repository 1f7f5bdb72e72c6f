"""`look_at`: the first prompt as its tokens, and what is odd about it.

A prompt that begins without the token that a model was trained to begin with, or was rendered
twice, is no error: the model answers, only much worse. So it is looked at before anything trains.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from kit.config import DataConfig
from kit.data.chat_template import added_tokens, opening, prefill
from kit.reports.status import FirstPrompt
from kit.samples import Messages
from kit.utils.formatting import shorten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from kit.data.prompts import PromptRow


def look_at(
    row: PromptRow,
    tokens: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataConfig,
    end_tokens: frozenset[int],
    token_text: Callable[[int], str],
) -> FirstPrompt:
    """Look at a prompt and the tokens that became of it; `end_tokens` end a turn."""
    prompt = row.prompt
    warnings = [
        _gives_the_answer(row),
        _without_bos(tokens, tokenizer, settings),
        _bos_of_template(tokens, tokenizer, settings),
        _ends_the_turn(tokens, tokenizer, end_tokens),
    ]
    notes = [_begun(prompt), _opened(prompt, tokens, tokenizer)]
    if settings.apply_chat_template:
        warnings.append(_rendered_twice(prompt, tokenizer))
        warnings.append(_nothing_ends_an_answer(tokenizer, settings, end_tokens))
        if settings.system_prompt and not isinstance(prompt, str):
            warnings.append(
                "data.system_prompt is not used: the prompt is a list of chat messages. Put a "
                "system message into the rows."
            )
    else:
        notes += _left_out(prompt, tokenizer)
    return FirstPrompt(
        tuple(tokens),
        tuple(map(token_text, tokens)),
        tuple(filter(None, warnings)),
        tuple(filter(None, notes)),
    )


def _without_bos(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, settings: DataConfig
) -> str:
    """Say that a plain prompt lacks the begin-of-sequence token that the model expects.

    Its template tells, and where it has none, that it has such a token at all, which is not the
    end-of-sequence token as with GPT-2.
    """
    bos = tokenizer.bos_token_id
    if settings.apply_chat_template or settings.add_bos_token is not None or bos is None:
        return ""
    template = tokenizer.chat_template
    expected = (
        template is None
        or "bos_token" in str(template)
        or str(tokenizer.bos_token) in str(template)
    )
    if not expected or bos == tokenizer.eos_token_id or bos in tokens[:1]:
        return ""
    return (
        f"The prompt does not begin with {tokenizer.bos_token!r}, as this model's own prompts do, "
        "and the tokenizer does not add it. Set data.add_bos_token: true; or false, if that is "
        "meant."
    )


def _bos_of_template(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, settings: DataConfig
) -> str:
    """Say that a rendered prompt begins twice, or without what the tokenizer begins texts with."""
    bos = tokenizer.bos_token_id
    if not settings.apply_chat_template or bos is None:
        return ""
    if list(tokens[:2]) == [bos, bos]:
        return (
            f"The prompt begins with {tokenizer.bos_token!r} twice: the chat template writes it, "
            "and the text has it too. Leave it out of the rows."
        )
    if bos in added_tokens(tokenizer)[0] and bos not in tokens[:1]:
        return (
            f"The prompt does not begin with {tokenizer.bos_token!r}, which this tokenizer puts in "
            "front of every text: the chat template does not write it. If the model was trained "
            "with it, put {{ bos_token }} at the beginning of the template, which is in "
            "chat_template.jinja or tokenizer_config.json."
        )
    return ""


def _nothing_ends_an_answer(
    tokenizer: PreTrainedTokenizerBase, settings: DataConfig, end_tokens: frozenset[int]
) -> str:
    """Say that no token which the template writes behind an answer ends a response.

    The model was trained to write it, and would go on after it to the longest response. What is
    looked at are an answer at the end and one that another question follows: of gpt-oss the first
    one ends as a response does, of GLM-4.5 the second.
    """
    known = sorted(
        ((str(t), i) for t, i in tokenizer.get_added_vocab().items()), key=lambda t: -len(t[0])
    )
    pattern = "|".join(re.escape(text) for text, _ in known)
    ids, behind = dict(known), []
    for text in _behind_answers(tokenizer, settings):
        found = re.findall(pattern, text) if pattern else []
        if any(ids[token] in end_tokens for token in found):
            return ""
        behind += found
    if not behind:
        return ""
    token = behind[0]
    return (
        f"The chat template writes {token!r} behind an answer, which does not end a response here: "
        f"responses would go on after it. Set rollout.stop_token_ids: [{ids[token]}], or name it "
        "as eos_token_id in the model's generation_config.json."
    )


_QUESTION, _ANSWER = "4711", "0815"


def _behind_answers(tokenizer: PreTrainedTokenizerBase, settings: DataConfig) -> Iterator[str]:
    """Text behind an answer at the end, and between an answer and the next question."""
    from jinja2 import TemplateError

    talk = [{"role": "user", "content": _QUESTION}, {"role": "assistant", "content": _ANSWER}]
    for messages in (talk, [*talk, {"role": "user", "content": _QUESTION}]):
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, **settings.chat_template_kwargs
            )
        except (TemplateError, ValueError, TypeError):  # it takes no answers
            continue
        behind = str(text).rpartition(_ANSWER)[2]
        yield behind.partition(_QUESTION)[0]


def _ends_the_turn(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]
) -> str:
    """Say that a prompt ends where the answer should begin."""
    last = next((t for t in reversed(tokens) if str(tokenizer.decode([t])).strip()), None)
    if last is None or last not in end_tokens:
        return ""
    return (
        f"The prompt ends with {tokenizer.decode([last])!r}, after which the model has nothing "
        "more to say. Leave it out of the rows, or take a chat template that opens the answer "
        "(add_generation_prompt)."
    )


def _rendered_twice(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> str:
    """Say that a prompt holds the marks of roles that the chat template writes around a message."""
    from jinja2 import TemplateError

    word = "x"
    message = {"role": "user", "content": word}
    try:
        around = str(tokenizer.apply_chat_template([message], tokenize=False))
    except (TemplateError, ValueError, TypeError):  # it wants more than one message
        return ""
    texts = [prompt] if isinstance(prompt, str) else [m.get("content", "") for m in prompt]
    before = around.partition(word)[0].removeprefix(str(tokenizer.bos_token or "")).strip()
    marks = sorted(str(token) for token in tokenizer.get_added_vocab() if str(token) in around)
    found = [mark for mark in (*marks, before) if mark and any(mark in text for text in texts)]
    if not found:
        return ""
    return (
        f"The prompt holds {found[0]!r}, which the chat template writes itself, so the model gets "
        "it twice. If the rows are rendered already, set data.apply_chat_template: false."
    )


def _left_out(prompt: str | Messages, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Say what the tokenizer would have added, and the text did not get."""
    front, behind = added_tokens(tokenizer)
    notes = []
    begins = str(tokenizer.decode(front)) if front else ""
    if begins and str(prompt).startswith(begins):
        notes.append(
            f"The text begins with {begins!r}, which the tokenizer adds too: there is one of it."
        )
    if behind:
        notes.append(
            f"The tokenizer ends every text with {tokenizer.decode(behind)!r}, which was left out: "
            "the answer is still to come."
        )
    return notes


def _begun(prompt: str | Messages) -> str:
    begun = prefill(prompt)
    if not begun:
        return ""
    return (
        f"The prompt ends with an assistant's message, {shorten(begun, 60)!r}, which the model "
        "continues. Leave it out of the rows if it is the answer itself."
    )


def _gives_the_answer(row: PromptRow) -> str:
    """Say that a row of a supervised data set still has the answer in its conversation."""
    begun, label = prefill(row.prompt), row.label
    if not isinstance(label, str) or not label.strip():
        return ""
    if not re.search(rf"(?<!\w){re.escape(label.strip())}(?!\w)", begun):
        return ""
    return (
        f"The prompt ends with an assistant's message that holds the right answer, "
        f"{shorten(label, 40)!r}. The model continues it: leave it out of the rows."
    )


def _opened(
    prompt: str | Messages, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> str:
    found = opening(tokens, tokenizer, prefill(prompt)).strip()
    if not found:
        return ""
    return (
        f"The prompt ends in {shorten(found, 60)}, so responses begin after it. Reward functions "
        "get it in front of `sample.response`; see `Sample.with_opening`."
    )
