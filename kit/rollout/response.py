"""`ResponseReader`: response tokens to the text that rewards and displays see.

The text is what the model wrote. The token that ended the response is left out, whether the
tokenizer holds it for special or not, and so is a stop string; other special tokens, such as
`<think>` and `<answer>`, stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

if TYPE_CHECKING:
    from kit.config import RolloutConfig
    from kit.models.source import ModelSource
    from kit.samples import Sample


@dataclass(frozen=True, slots=True)
class ResponseReader:
    """Reads responses of one session."""

    tokenizer: Any
    end_tokens: frozenset[int]
    """Each of them ends a response."""
    stop: tuple[str, ...] = ()
    """Each of them ends a response, too."""
    skip_special_tokens: bool = False
    include_stop: bool = False
    """Whether a stop string stays in the text."""
    vocabulary: int = 0
    """Number of tokens that the model can write; more than the tokenizer has where its output is
    padded."""

    @classmethod
    def of(cls, tokenizer: Any, model: ModelSource, settings: RolloutConfig) -> Self:
        """Reader for a model; its files, its tokenizer and the settings name the end tokens."""
        own = tokenizer.eos_token_id
        ends = {*model.eos_token_ids, *settings.stop_token_ids, *([] if own is None else [own])}
        return cls(
            tokenizer,
            frozenset(ends),
            settings.stop,
            settings.skip_special_tokens,
            settings.include_stop_str_in_output,
            max(model.vocabulary, len(tokenizer)),
        )

    def read(self, tokens: Sequence[int]) -> tuple[str, bool]:
        """Text of a response, and whether it ends with an end token or a stop string."""
        ended = bool(tokens) and tokens[-1] in self.end_tokens
        text = self._decode(tokens[:-1] if ended else tokens, self.skip_special_tokens)
        found = [(at, stop) for stop in self.stop if (at := text.find(stop)) >= 0]
        if not found:
            return text, ended
        at, stop = min(found)
        return text[: at + len(stop) if self.include_stop else at], True

    def could_read(self, tokens: Sequence[int], text: str) -> bool:
        """Whether the tokens read so, under whichever settings: ends and special tokens may lack.

        False for a text that belongs to other tokens, or to another tokenizer.
        """
        forms = (self._decode(tokens, skip).strip() for skip in (False, True))
        return any(form.startswith(text.strip()) for form in forms)

    def notes(self, samples: Iterable[Sample]) -> tuple[str, ...]:
        """What is to know of tokens that no text shows, because the tokenizer has no such ids."""
        size, every = len(self.tokenizer), list(samples)
        if self.vocabulary <= size:
            return ()
        odd = [m for s in every if (m := max(s.response_tokens, default=0)) >= size]
        if not odd:
            return ()
        return (
            f"{len(odd)} of {len(every)} responses hold token ids that the tokenizer does not "
            f"have, such as {odd[0]}: it has {size:,}, the model's output {self.vocabulary:,}. "
            "They are trained on, and no text shows them. A trained model hardly ever writes one: "
            "check that weights and tokenizer belong together.",
        )

    def _decode(self, tokens: Sequence[int], skip_special_tokens: bool) -> str:
        # An array: each number of a list would be looked at, one by one, in Python.
        ids = np.asarray(tokens, dtype=np.int64)
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens))


def stop_over_seam(before: Sequence[str], after: Sequence[str], stops: Sequence[str]) -> int:
    """Number of tokens of a continuation to keep if a stop string began before it; else 0.

    The engine looks for stop strings in what it writes now, so it cannot see such a one.
    """
    if not stops:
        return 0
    longest = max(map(len, stops))
    text = "".join(before)[-longest:]
    seam = len(text)
    for count, token in enumerate(after, start=1):
        text += token
        if any(0 <= text.find(stop) < seam for stop in stops):
            return count
        if len(text) > seam + longest:
            break
    return 0
