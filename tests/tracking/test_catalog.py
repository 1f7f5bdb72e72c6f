"""Every metric that is logged is explained, and nothing else is."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

import kit
from kit.algo.corrections import Mode, Rejection, mis, opsm
from kit.tracking.catalog import MEANINGS, meaning

PACKAGE = Path(kit.__file__).parent

NAME = re.compile(r"(train|rollout|perf|eval)/[\w{}/@-]*[\w}]")


def names_in(file: Path) -> Iterator[str]:
    """Names of metrics in a module's text, `{}` where an f-string has a value."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr)
             for part in node.values}  # fmt: skip
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            text = "".join(
                str(part.value) if isinstance(part, ast.Constant) else "{}" for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = "" if id(node) in parts else node.value
        else:
            continue
        if NAME.fullmatch(text):
            yield text


def names_of_the_corrections() -> set[str]:
    """The metrics that `kit.algo` names by itself, under the prefix that the trainer gives them."""
    log_prob_T, sample_T = torch.tensor([-1.0, -2.0]), torch.tensor([0, 0])
    tokens = (log_prob_T, log_prob_T, sample_T, torch.ones(2))
    found: set[str] = set()
    for mode in get_args(Mode):
        *_, metrics = mis(
            *tokens, "token", mode, veto=1e-4, rs=Rejection("token"), batch_normalize=True
        )
        found |= metrics.keys()
    *_, metrics = opsm(*tokens[:2], torch.ones(2), *tokens[2:], delta=1e-4)
    return {f"train/{name}" for name in found | metrics.keys()}


def logged() -> set[str]:
    """All names in the package but for those that only explain or show them."""
    shown = (PACKAGE / "viz", PACKAGE / "tracking/catalog.py")
    files = (file for file in PACKAGE.rglob("*.py")
             if not any(file.is_relative_to(place) for place in shown))  # fmt: skip
    return {name for file in files for name in names_in(file)} | names_of_the_corrections()


def test_a_name_that_is_logged_or_shown_has_a_meaning() -> None:
    shown = {name for file in (PACKAGE / "viz").rglob("*.py") for name in names_in(file)}
    bare = "train/{}"  # the corrections' own, which are looked at by name
    unknown = [n for n in (logged() | shown) - {bare} if not meaning(n.replace("{}", "7")).words]
    assert sorted(unknown) == []


def test_nothing_is_explained_that_is_not_logged() -> None:
    names = {re.sub(r"\{\}", "*", name) for name in logged()}
    assert sorted(MEANINGS.keys() - names) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("eval/gsm8k", "mean reward on held-out prompts"),
        ("eval/gsm8k-pass@4", "chance that at least one of so many responses is right"),
        ("rollout/zero_std/count_0.5", "groups whose rewards are all equal: nothing to learn"),
        ("rollout/unheard_of", ""),
    ],
)
def test_a_family_of_names_shares_its_meaning(name: str, words: str) -> None:
    assert meaning(name).words == words
