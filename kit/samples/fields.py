"""The types of a sample's fields, checked where a sample is read from a file.

A sample that the kit makes has the right types; one that was written by hand, by another program or
with bad intent may not, and would fail far away: a text where a token is expected fails in the
trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Check = Callable[[Any], bool]


def _whole(value: Any) -> bool:
    return type(value) is int and -(2**63) <= value < 2**63


def _number(value: Any) -> bool:
    return type(value) in (int, float)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _wholes(value: Any) -> bool:
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:
        return False
    return not value or (min(value) >= -(2**63) and max(value) < 2**63)


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and set(map(type, value)) <= {int, float}


def _named(inner: Check) -> Check:
    return lambda value: (
        isinstance(value, dict) and all(isinstance(k, str) and inner(v) for k, v in value.items())
    )


def _or_none(check: Check) -> Check:
    return lambda value: value is None or check(value)


def _message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str)


def _prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(map(_message, value)))


def _zeros_and_ones(value: Any) -> bool:
    return _wholes(value) and set(value) <= {0, 1}


def _experts(value: Any) -> bool:
    return isinstance(value, dict) or type(value).__name__ == "RoutedExperts"


_WHOLE, _TEXT = (_whole, "a whole number"), (_text, "text")
_WHOLES = (_wholes, "a list of whole numbers")
_FIELDS: Mapping[str, tuple[Check, str]] = {
    "group_index": _WHOLE,
    "index": _WHOLE,
    "response_length": (lambda value: _whole(value) and value >= 0, "a whole number from 0 on"),
    "top_k": _WHOLE,
    "response": _TEXT,
    "opening": _TEXT,
    "error": (_or_none(_text), "text"),
    "prompt": (_prompt, "text, or a list of messages with a role"),
    "tokens": _WHOLES,
    "weight_versions": _WHOLES,
    "version_lengths": _WHOLES,
    "annotated_versions": _WHOLES,
    "loss_mask": (_or_none(_zeros_and_ones), "a list of 0 and 1"),
    "rollout_log_probs": (_or_none(_numbers), "a list of numbers"),
    "rollout_drafted": (_or_none(_wholes), "a list of whole numbers"),
    "rollout_routed_experts": (_or_none(_experts), "a record of experts"),
    "reward": (_or_none(_number), "a number"),
    "temperature": (_or_none(_number), "a number"),
    "top_p": (_number, "a number"),
    "reward_parts": (_named(_or_none(_number)), "numbers by name"),
    "token_values": (_named(_numbers), "lists of numbers by name"),
    "spec_info": (_named(_whole), "whole numbers by name"),
    "metadata": (lambda value: isinstance(value, dict), "a mapping"),
}
"""Of each field that has a type: whether a value is of it, and what to call that."""


def wrong_type(row: Mapping[str, Any]) -> str:
    """The first field of a row that has another type than a sample's, as a sentence; "" if none."""
    for name, (fits, kind) in _FIELDS.items():
        if name in row and not fits(row[name]):
            return f"Its {name} is no {kind.removeprefix('a ')}."
    return ""
