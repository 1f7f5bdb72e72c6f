"""`check_prompt`: prompts as people write them, down to text or chat messages.

Known are text; messages with `role` and `content`, as a list or as JSON text; conversations with
`from` and `value`; contents in parts of text; and turns that call tools, whose content is null.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from kit.data.plain import plain
from kit.errors import DataError
from kit.samples import Messages
from kit.utils.reading import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
_SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function_response": "tool",
}
"""What the `from` of a conversation means."""
EXAMPLE = '{"role": "user", "content": "..."}'


def check_prompt(value: Any, where: str) -> str | Messages:
    """Return a prompt as text or chat messages. Raises DataError, which begins with `where`."""
    if isinstance(value, str):
        value = _json_messages(value)
    if isinstance(value, str):
        if value:
            return whole_text(value, where)
        raise DataError(f"{where} is empty.", fix="give the row a prompt, or leave it out.")
    value = plain(value)
    if isinstance(value, Mapping):
        raise DataError(
            f"{where} is one mapping, {short(value)}, and not a list of chat messages.",
            fix=f"write a list, also of a single message: [{EXAMPLE}].",
        )
    if not isinstance(value, Sequence) or not value:
        raise DataError(
            f"{where} must be a string or a list of chat messages, not {short(value)} "
            f"({type(value).__name__}).",
            fix=f"write text, or [{EXAMPLE}].",
        )
    return [_message(message, f"{where}, message {n}") for n, message in enumerate(value, start=1)]


def whole_text(text: str, where: str) -> str:
    """Return a text. Raises DataError if it holds half of a surrogate pair, which is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} has half of a surrogate pair, {text[error.start]!r}, at character "
            f"{error.start}.",
            why="It is half of a character outside the first 65,536, such as an emoji that was cut "
            "in two, and no tokenizer takes it.",
            fix="mend or leave out the row; text.encode('utf-8', 'replace').decode() puts a '?' "
            "in its place.",
        ) from None
    return text


def short(value: Any) -> str:
    """A value in an error message, at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _json_messages(text: str) -> Any:
    """Messages that are written as JSON text, as in a cell of a CSV file; else the text itself."""
    if text.lstrip().startswith("[") and ('"role"' in text or '"from"' in text):
        with suppress(ValueError):
            found = parse_json(text)
            if found and all(isinstance(one, Mapping) for one in found):
                return found
    return text


def _message(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise DataError(
            f"{where} is {short(value)} ({type(value).__name__}), not a mapping.",
            fix=f"write each message as {EXAMPLE}.",
        )
    # Columnar files give every message the union of all keys, filled with None.
    message = {str(key): item for key, item in value.items() if item is not None}
    if "role" not in message and {"from", "value"} <= message.keys():
        message["role"], message["content"] = message.pop("from"), message.pop("value")
    if "content" not in message and message.get("tool_calls"):
        message["content"] = ""
    message["content"] = _joined(message.get("content"), where)
    for key in ("role", "content"):
        if not isinstance(message.get(key), str):
            has = ", ".join(map(str, value)) or "nothing"
            raise DataError(
                f"{where}: {key!r} must be text, not {short(value.get(key))}. The message "
                f"has: {has}.",
                fix=f"write each message as {EXAMPLE}.",
            )
        whole_text(message[key], f"{where}: {key!r}")
    role = _SPEAKERS.get(message["role"].lower(), message["role"].lower())
    message["role"] = role if role in ROLES else message["role"]
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call) for call in message["tool_calls"]]
    return message


def _joined(content: Any, where: str) -> Any:
    """Text of a content in parts; anything else as it is. Raises DataError for images and such."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            kind = part.get("type", "unknown") if isinstance(part, Mapping) else type(part).__name__
            raise DataError(
                f"{where}: a part of 'content' is of the kind {kind!r}, not text.",
                fix="leave it out; models here read text.",
            )
        texts.append(text)
    return "".join(texts)


def _tool_call(call: Any) -> Any:
    """Call of a tool, its arguments as a mapping: templates would quote JSON text once more."""
    if not isinstance(call, Mapping):
        return call
    function = call.get("function")
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        with suppress(ValueError):
            function = {**function, "arguments": parse_json(function["arguments"])}
            return {**call, "function": function}
    return dict(call)
