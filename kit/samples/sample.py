"""`Sample`, one response to one prompt, with the checks that it passes when made."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from kit.errors import DataError
from kit.samples import token_values as by_token
from kit.samples.fields import wrong_type
from kit.utils.display import Picture, Shown, pictures
from kit.utils.formatting import shorten
from kit.utils.reading import kind_of

if TYPE_CHECKING:
    from kit.samples.experts import RoutedExperts

Messages = list[dict[str, Any]]
"""Chat messages: `role` and `content` are text; a turn may call tools."""


class Status(StrEnum):
    """State of a sample: pending, completed, truncated, aborted or failed."""

    PENDING = "pending"
    """Not generated yet."""
    COMPLETED = "completed"
    """The model ended its response itself (end-of-sequence token or stop string)."""
    TRUNCATED = "truncated"
    """Cut at the length limit."""
    ABORTED = "aborted"
    """Stopped from outside; the tokens so far are kept."""
    FAILED = "failed"
    """The reward function failed on it; `error` says how. Its group is left out of the update."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample(Shown):
    """One response to one prompt, with everything that training needs to know about it."""

    group_index: int = 0
    """Samples of the same prompt share it."""
    index: int = 0
    """Position in the rollout."""
    prompt: str | Messages = ""
    """The prompt as the data gave it: a string, or chat messages."""
    tokens: list[int] = field(default_factory=list)
    """Prompt and response token ids, in one list."""
    response: str = ""
    """What the model wrote, without the token or the string that ended it; see
    `kit.rollout.response`."""
    response_length: int = 0
    """Response tokens; the last so many of `tokens`."""
    opening: str = ""
    """The tag at the prompt's end that the response goes on from, such as `<think>`. Reward
    functions get it in front of `response`; see `with_opening`."""
    label: Any = None
    """The right answer, where the data has one: text, or a list or mapping for a reward function
    of your own."""
    reward: float | None = None
    reward_parts: dict[str, float] = field(default_factory=dict)
    """The parts of the reward by name, before weighing; empty where it has none."""
    loss_mask: list[int] | None = None
    """One 0 or 1 per response token; None means that all are trained on."""
    status: Status = Status.PENDING
    metadata: dict[str, Any] = field(default_factory=dict)
    rollout_log_probs: list[float] | None = None
    """The engine's log-probability of each response token, at the sampling temperature."""
    temperature: float | None = None
    """The temperature that its tokens were drawn at; None where that is unknown."""
    top_p: float = 1.0
    """The share of the probability that its tokens were drawn from."""
    top_k: int = -1
    """The number of likeliest tokens that its tokens were drawn from; -1 for all."""
    rollout_routed_experts: RoutedExperts | None = None
    """The engine's experts of every token but the last, (tokens - 1, layers with experts, top k),
    as the pass chose them that gave the token's log-prob; None where the engine reports none."""
    spec_info: dict[str, int] = field(default_factory=dict)
    """Where the engine drafted: `verify_ct` of `passes` of the model verified drafts,
    `num_proposed_drafts` and `num_correct_drafts` drafted and accepted tokens, and `tokens` that
    those passes gave; `us` microseconds of passes, its share of those of all their requests, of
    which `plain_us` is known, what ones without drafts would have taken. Empty where none did."""
    rollout_drafted: list[int] | None = None
    """Of each response token its place in the draft from which it was accepted, the first 1, and 0
    for what the model wrote itself; None where the engine did not draft."""
    weight_versions: list[int] = field(default_factory=list)
    """Which trainer weights wrote it, one entry per span of response tokens."""
    version_lengths: list[int] = field(default_factory=list)
    """Response tokens of each span; empty where one version wrote them all."""
    error: str | None = None
    """Why the reward function failed, in its own words."""
    token_values: dict[str, list[float]] = field(default_factory=dict)
    """What `session.annotate` found of each response token; see `kit.samples.token_values`."""
    annotated_versions: list[int] = field(default_factory=list)
    """Weight versions of `trainer_log_prob_before`, where known, and of `trainer_log_prob`."""

    def __post_init__(self) -> None:
        lengths = self.version_lengths
        if lengths and (
            len(lengths) != len(self.weight_versions)
            or min(lengths) < 1
            or sum(lengths) != self.response_length
        ):
            raise DataError(
                f"version_lengths {lengths} does not part {self.response_length} response tokens "
                f"among the weight_versions {self.weight_versions}.",
                fix="give one length of 1 or more for each version, together response_length; or "
                "leave version_lengths empty where one version wrote all.",
            )
        for name, values in self._per_token():
            if len(values) != self.response_length:
                raise DataError(
                    f"{name} has {len(values)} numbers for {self.response_length} response tokens.",
                    fix="give one number for each response token; `response_length` counts them.",
                )
        if self.rollout_routed_experts is not None:
            self._check_experts(self.rollout_routed_experts)
        if len(self.annotated_versions) > 2:
            raise DataError(
                "annotated_versions holds more than two weight versions: "
                f"{self.annotated_versions}.",
                fix="give those of trainer_log_prob_before and trainer_log_prob, or fewer.",
            )

    def _check_experts(self, experts: RoutedExperts) -> None:
        if len(experts) != max(len(self.tokens) - 1, 0):
            raise DataError(
                f"rollout_routed_experts has {len(experts)} rows for {len(self.tokens)} tokens.",
                fix="give one row for each token of prompt and response but the last.",
            )

    def _per_token(self) -> Iterator[tuple[str, Sequence[float]]]:
        """What must have one number for each response token, by name."""
        if self.loss_mask is not None:
            yield "loss_mask", self.loss_mask
        if self.rollout_drafted is not None:
            yield "rollout_drafted", self.rollout_drafted
        for name, values in self.token_values.items():
            yield f"token_values[{name!r}]", values

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(weight version, response tokens it wrote), in order; empty where that is unknown."""
        if self.version_lengths:
            return list(zip(self.weight_versions, self.version_lengths, strict=True))
        if len(self.weight_versions) == 1 and self.response_length:
            return [(self.weight_versions[0], self.response_length)]
        return []

    @property
    def prompt_tokens(self) -> list[int]:
        """The prompt's token ids."""
        return self.tokens[: len(self.tokens) - self.response_length]

    @property
    def response_tokens(self) -> list[int]:
        """The response's token ids."""
        return self.tokens[len(self.tokens) - self.response_length :]

    @property
    def prompt_text(self) -> str:
        """The prompt as a person reads it: chat messages joined by newlines."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(str(message.get("content", "")) for message in self.prompt)

    @property
    def label_text(self) -> str | None:
        """The label as a person reads it; None without one."""
        if self.label is None or isinstance(self.label, str):
            return self.label
        return json.dumps(self.label, default=str)

    @property
    def mask(self) -> list[int]:
        """The loss mask, written out: one 0 or 1 per response token."""
        return [1] * self.response_length if self.loss_mask is None else self.loss_mask

    @property
    def advantage(self) -> float | None:
        """The mean over the tokens that train; None where it is not among `token_values`."""
        values = self.token_values.get("advantage")
        return None if values is None else by_token.trained_mean(values, self.mask)

    def strip(self, quantity: str | None = None, start: int = 0) -> Picture:
        """Every response token, coloured by a quantity that is known of it.

        Args:
            quantity: one of `kit.samples.token_values`, such as `entropy` or `change`, or a name of
                your own in the sample's `token_values`; None takes the most telling one.
            start: the first token drawn, for responses longer than one strip.

        Raises:
            DataError: it is not known of this sample; the message says what to call.
        """
        drawn: Picture = pictures().show_strip(self, quantity, start)
        return drawn

    def to_pandas(self) -> Any:
        """One row a response token, with a column for each quantity that is known."""
        from kit.samples.serialization import token_table

        return token_table(self)

    def continued(
        self,
        tokens: Sequence[int],
        log_probs: Sequence[float],
        weight_version: int,
        experts: RoutedExperts | None = None,
        spec_info: Mapping[str, int] | None = None,
        drafted: Sequence[int] | None = None,
    ) -> Sample:
        """Copy with further response tokens, generated by these weights.

        Args:
            tokens: that are appended.
            log_probs: theirs, in the engine.
            weight_version: of the weights that wrote them.
            experts: of all tokens, those that there were included, as this pass read them; what
                earlier passes recorded of earlier tokens stays.
            spec_info: of these tokens, where the engine drafted.
            drafted: their `rollout_drafted`, likewise.

        Raises:
            DataError: it has tokens of which nobody knows who wrote them.
        """
        spans = self.spans
        if self.response_length and not (spans and self.rollout_log_probs):
            raise DataError(
                "A sample without log-probs or weight versions cannot be continued.",
                why=f"Its {self.response_length} response tokens were not written by the engine.",
                fix="generate it anew.",
            )
        if tokens and spans and spans[-1][0] == weight_version:
            spans[-1] = (weight_version, spans[-1][1] + len(tokens))
        elif tokens:
            spans.append((weight_version, len(tokens)))
        length = len(self.tokens) + len(tokens)
        counted = Counter(self.spec_info)
        counted.update(spec_info or {})
        places = self.rollout_drafted
        if drafted is not None or places is not None:
            before = places or [0] * self.response_length
            places = [*before, *(drafted or [0] * len(tokens))]
        return replace(
            self,
            tokens=[*self.tokens, *tokens],
            response_length=self.response_length + len(tokens),
            loss_mask=None if self.loss_mask is None else [*self.loss_mask, *[1] * len(tokens)],
            rollout_log_probs=[*(self.rollout_log_probs or ()), *log_probs],
            rollout_routed_experts=self._experts_up_to(length, experts),
            spec_info=dict(counted),
            rollout_drafted=places,
            weight_versions=[version for version, _ in spans] or [weight_version],
            version_lengths=[length for _, length in spans] if len(spans) > 1 else [],
            token_values={},
            annotated_versions=[],
        )

    def _experts_up_to(self, length: int, now: RoutedExperts | None) -> RoutedExperts | None:
        """The record of so many tokens: what there was of earlier ones, then the present one."""
        before = self.rollout_routed_experts if self.response_length else None
        known = now if before is None else before
        if known is None:
            return None
        earlier = max(len(self.tokens) - 1, 0) if self.response_length else 0
        first = known.unknown(earlier) if before is None else before
        rest = known.unknown(length - 1) if now is None else now
        return first.followed_by(rest.first(length - 1))

    def masked_to(self, weight_version: int) -> Sample:
        """Copy in which only tokens of these weight versions are trained on."""
        if all(version == weight_version for version, _ in self.spans):
            return self
        own = [version == weight_version for version, length in self.spans for _ in range(length)]
        trained = [mask * mine for mask, mine in zip(self.mask, own, strict=True)]
        return replace(self, loss_mask=trained)

    def reset_response(self) -> Sample:
        """Copy with the prompt alone, without a response."""
        return replace(
            self,
            tokens=self.prompt_tokens,
            response="",
            response_length=0,
            reward=None,
            reward_parts={},
            loss_mask=None,
            status=Status.PENDING,
            rollout_log_probs=None,
            rollout_routed_experts=None,
            spec_info={},
            rollout_drafted=None,
            weight_versions=[],
            version_lengths=[],
            error=None,
            token_values={},
            annotated_versions=[],
        )

    def with_opening(self) -> Sample:
        """Copy whose response begins with the prompt's `opening`, as reward functions get it."""
        if self.response.startswith(self.opening):
            return self
        return replace(self, response=self.opening + self.response)

    def with_values(self, **values: Sequence[float]) -> Sample:
        """Copy with these `token_values` added."""
        new = {name: list(row) for name, row in values.items()}
        return replace(self, token_values=self.token_values | new)

    def with_reward(self, reward: float, parts: Mapping[str, float] | None = None) -> Sample:
        """Copy with a reward, and its parts by name where it has some."""
        return replace(self, reward=reward, reward_parts=dict(parts or {}), error=None)

    def with_failure(self, error: str) -> Sample:
        """Copy marked as failed: its reward could not be computed."""
        return replace(self, reward=None, reward_parts={}, status=Status.FAILED, error=error)

    def to_dict(self) -> dict[str, Any]:
        """Convert to JSON's types, as `save` writes them."""
        experts = self.rollout_routed_experts
        row = asdict(self if experts is None else replace(self, rollout_routed_experts=None))
        return row | {
            "status": self.status.value,
            "rollout_routed_experts": None if experts is None else experts.to_json(),
        }

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> Sample:
        """The inverse of `to_dict`.

        Raises:
            DataError: a field that a sample does not have, or a value of another type than its.
        """
        if not isinstance(row, Mapping):
            raise DataError(f"A sample is a mapping of its fields, not {kind_of(row)}.")
        known = {f.name for f in fields(cls)}
        unknown = sorted(map(str, set(row) - known))
        if unknown:
            raise DataError(
                f"A sample has no field {shorten(unknown[0], 60)!r}.",
                fix=f"Keep only: {', '.join(sorted(known))}.",
            )
        if wrong := wrong_type(row):
            raise DataError("It is no sample.", why=wrong)
        try:
            status = Status(row.get("status", "pending"))
        except ValueError:
            given = shorten(str(row["status"]), 60)
            raise DataError(
                f"A sample has no status {given!r}.", fix=f"Take one of: {', '.join(Status)}."
            ) from None
        experts = row.get("rollout_routed_experts")
        if isinstance(experts, Mapping):
            from kit.samples.experts import RoutedExperts

            experts = RoutedExperts.from_json(experts)
        return cls(**dict(row) | {"status": status, "rollout_routed_experts": experts})
