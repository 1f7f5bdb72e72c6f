"""Dropout and router noise of a model: switched off, in training mode too.

A policy that drops something at random is another one at each pass: the probability ratio of its
first update would not be 1, and the engine, which drops nothing, writes samples of a third one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.utils.reading import read_object

if TYPE_CHECKING:
    from torch import nn

WORDS = ("drop", "jitter")
"""Parts of the names of such settings."""
OF_OTHER_HEADS = "classifier"


def configured(directory: str | Path) -> list[str]:
    """Settings of a model directory's config.json that drop something: `attention_dropout 0.1`."""
    tree = read_object(Path(directory) / "config.json", unique=False)
    return [f"{name} {value:g}" for name, value in _settings(tree)]


def _settings(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, float]]:
    for name, value in tree.items():
        if isinstance(value, Mapping):
            yield from _settings(value, f"{above}{name}.")
        elif _drops(name, value):
            yield above + name, value


def _drops(name: str, value: object) -> bool:
    is_one = any(word in name for word in WORDS) and OF_OTHER_HEADS not in name
    return is_one and isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def switch_off(model: nn.Module) -> None:
    """Have a model of Transformers drop nothing, whatever mode it is in.

    Its layers keep such a number as an attribute, in a `Dropout`, or read the configuration.
    """
    from torch.nn import Dropout

    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = 0.0
        for part in (module, getattr(module, "config", None)):
            for name, value in list(vars(part).items()) if part is not None else ():
                if _drops(name, value):
                    setattr(part, name, 0.0)
