"""What the passes of a response accepted, as the scheduler notes it and a sample tells it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Self

from kit.errors import StackError


@dataclass(frozen=True, slots=True)
class Passes:
    """What the passes of a response have noted; see `note_pass`."""

    noted: tuple[Note, ...]

    @classmethod
    def of(cls, meta: dict[str, Any], tokens: int) -> Self:
        """Those of a response.

        Args:
            meta: SGLang's `meta_info` of it.
            tokens: of it. The first comes from reading the prompt, without a pass.

        Raises:
            StackError: there were passes, and SGLang does not tell of all of them.
        """
        flat, width = meta.get("spec_correct_drafts_histogram") or [], len(fields(Note))
        count = meta.get("spec_verify_ct")
        missing = count is None if tokens > 1 else False
        if missing or len(flat) != width * (count or 0):
            raise StackError(
                f"The engine drafts, and tells of {len(flat) // width} of the {count} passes that "
                f"wrote {tokens} tokens.",
                why="Nobody would see a draft that no longer helps.",
                fix="install the SGLang version that requirements.lock names.",
            )
        places = range(0, len(flat), width)
        return cls(tuple(Note(*flat[place : place + width]) for place in places))

    def spec_info(self, tokens: int) -> dict[str, int]:
        """See `Sample.spec_info`; `tokens` are those of the response."""
        if not self.noted:
            return {}
        drafts = [note for note in self.noted if note.proposed]
        timed = [note for note in self.noted if note.plain_us]
        return {
            "passes": len(self.noted),
            "verify_ct": len(drafts),
            "num_proposed_drafts": sum(note.proposed for note in drafts),
            "num_correct_drafts": sum(note.correct for note in drafts),
            "tokens": sum(note.end(tokens) - note.first for note in drafts),
            "us": sum(note.us for note in timed),
            "plain_us": sum(note.plain_us for note in timed),
        }

    def drafted(self, tokens: int) -> list[int]:
        """See `Sample.rollout_drafted`; `tokens` are those of the response."""
        places = [0] * tokens
        for note in self.noted:
            end = min(note.first + note.correct, tokens)
            places[note.first : end] = range(1, end - note.first + 1)
        return places


@dataclass(frozen=True, slots=True)
class Note:
    """A pass that verified the drafts of a request, or went without."""

    first: int
    """Place of the first token that it wrote, in the response."""
    correct: int
    """Drafted tokens that it accepted."""
    proposed: int
    """Drafted tokens that it looked at; 0 for a pass without drafts."""
    us: int
    """Microseconds that it took, the share of this request; 0 where that is not known."""
    plain_us: int
    """Microseconds that passes without drafts would take for what it gave; likewise."""

    def end(self, tokens: int) -> int:
        """Place after the last token that it wrote of a response of so many tokens.

        A pass may go on past the end of a response.
        """
        return min(self.first + self.correct + 1, tokens)
