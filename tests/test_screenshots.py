"""The pictures of `docs/screenshots` are all there, and are of one run whose numbers agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).parent.parent / "docs" / "screenshots"
PAGE = (FOLDER / "README.md").read_text("utf-8")
ALL = 2_000_000
"""Bytes of all pictures together."""


def words() -> dict[str, str]:
    """Each display in words, by its name."""
    parts = re.findall(r"^## (\S+)$.*?```text\n(.*?)```", PAGE, re.DOTALL | re.MULTILINE)
    return dict(parts)


WORDS = words()


def first(pattern: str, name: str) -> str:
    """What a display says."""
    assert name in WORDS, "make screenshots"
    found = re.search(pattern, WORDS[name])
    assert found, f"{name} does not say {pattern!r}"
    return found[1]


def number(pattern: str, name: str) -> float:
    return float(first(pattern, name).replace(",", ""))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_display_of_the_page_has_its_picture_and_no_picture_is_left_over(theme: str) -> None:
    pictures = {path.name for path in FOLDER.glob(f"*-{theme}.png")}
    assert pictures == {f"{name}-{theme}.png" for name in WORDS}
    assert all(f"{name}-{theme}.png" in PAGE for name in WORDS)


def test_the_pictures_are_small_and_none_is_empty() -> None:
    files = sorted(FOLDER.glob("*.png"))
    assert sum(file.stat().st_size for file in files) < ALL
    for file in files:
        with Image.open(file) as picture:
            assert picture.getcolors() is None or len(picture.getcolors()) > 2, file.name


def test_the_page_says_what_ran_where() -> None:
    for fact in ("model", "data", "training", "machine", "versions", "day"):
        assert re.search(rf"^\| {fact} \| \S", PAGE, re.MULTILINE), fact
    assert not re.search(r"(?<![\w.])/(home|root|work|Users)/\w", PAGE)


def test_the_displays_of_one_step_speak_of_one_step() -> None:
    step = first(r"Rollout of step (\d+)", "rollout")
    assert first(r"Batch of step (\d+)", "batch") == step
    assert first(r"Update of step (\d+)", "update") == step
    assert number(r"of step (\d+)", "what-if") == int(step)
    assert number(r"at step (\d+) on", "evaluation-pass-at-k") > int(step)
    assert int(first(r"Step (\d+)", "step")) == int(step) + 1
    trained = number(r"Training run: (\d+) steps \(0 to", "training")
    assert trained == int(step)


def test_the_learning_rate_is_the_same_wherever_it_is_said() -> None:
    said = re.search(r"^\| training \|.*learning rate ([\d.e-]+)", PAGE, re.MULTILINE)
    assert said
    assert number(r"train/lr\s+([\d.e-]+)", "update") == float(said[1])
    assert number(r"0\s+as configured\s+([\d.e-]+)", "what-if") == float(said[1])


def test_the_reward_of_the_last_step_is_the_same_in_the_step_and_in_the_session() -> None:
    reward = number(r"reward ([\d.]+)", "step")
    assert number(r"reward, last rollout ([\d.]+)", "session") == reward


def test_pass_at_one_is_the_accuracy_of_the_same_evaluation() -> None:
    accuracy = number(r": ([\d.]+)% \(95% interval", "evaluation-pass-at-k")
    assert number(r"pass@1 ([\d.]+)%", "evaluation-pass-at-k") == accuracy
