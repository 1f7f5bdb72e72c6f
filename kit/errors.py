"""Every error the kit raises on purpose: what happened, why, and what to do next.

A stranger must be able to act on the message alone, so each error is made of three parts, and
prints them as sentences. The kinds below name the layer that failed, not the place in the code.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import partial


class KitError(Exception):
    """An error that a user can act on.

    Args:
        what: what happened, with the value that was wrong.
        why: why that cannot work. Left out where `what` says it already.
        fix: what to do next, naming the setting to change.
    """

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        lines = "\n".join(_bounded(line, LONGEST_LINE) for line in what.split("\n"))
        parts = [lines, why, f"What to do: {fix}" if fix else ""]
        message = "\n".join(_bounded(part) for part in parts if part)
        # Half a surrogate pair, quoted from somebody's data, cannot be sent to a notebook: the
        # kernel would neither show the error nor ever answer again.
        super().__init__(message.encode("utf-8", "backslashreplace").decode("utf-8"))

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the three parts when the error crosses from an actor to the notebook."""
        return partial(type(self), self.what, why=self.why, fix=self.fix), ()


LONGEST_PART = 8000
"""Characters of a part of a message; longer ones quote somebody's data."""
LONGEST_LINE = 1000
"""Characters of a line of what happened, which quotes the value that was wrong."""


def _bounded(text: str, most: int = LONGEST_PART) -> str:
    """A part of a message without the middle of what nobody reads to its end."""
    if len(text) <= most:
        return text
    half = most // 2
    return f"{text[:half]} [... {len(text) - 2 * half:,} characters ...] {text[-half:]}"


class ConfigError(KitError):
    """A setting is unknown, of the wrong type, or cannot be combined with another."""


class DataError(KitError):
    """Prompts cannot be read: a missing file, a malformed row, an empty dataset."""


class RewardError(KitError):
    """A reward function broke its contract, or a reward has no such name."""


class ModelError(KitError):
    """A model or tokenizer cannot be loaded, or does not fit what is asked of it."""


class StackError(KitError):
    """Ray, the engine or the trainer could not start, or died."""


class StoppedError(KitError):
    """Work that somebody asked to stop has stopped, and left everything as it was before."""


class SessionError(KitError):
    """A verb was called at the wrong time: before `start`, after `close`, out of order."""


class CheckpointError(KitError):
    """A checkpoint cannot be written or read."""


class RunError(KitError):
    """A notebook run cannot start: an unknown notebook or parameter, a wrong value."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`Did you mean 'x'?`, or the list of known words where none is near."""
    choices = sorted(choice if len(choice) <= 400 else f"{choice[:399]}…" for choice in known)
    near = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    return f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(choices)}."
