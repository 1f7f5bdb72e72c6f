"""Quantities by response token: their names, meanings, and where each comes from.

Measured ones are lists in `Sample.token_values`, one number a response token; `session.annotate`
fills them in. Derived ones are worked out of those when asked for. Names that are not listed here
are taken too: put a list of your own into `token_values`, and every display knows it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kit.errors import DataError, did_you_mean

if TYPE_CHECKING:
    from kit.samples.sample import Sample


Kind = Literal["log_prob", "amount", "signed", "ratio", "category"]
ANNOTATE = "rollout = session.annotate(rollout)"
TWICE = (
    "annotate the same rollout or batch before and after an update: `batch = "
    "session.annotate(batch)`, `session.update(batch)`, `batch = session.annotate(batch)`"
)
BATCH = "batch = session.annotate(session.advantages(rollout))"
LARGEST_LOG_RATIO = 20.0
"""Log-ratios are clamped to it on either side, as in the losses of `kit.algo`."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """A quantity with one number per response token."""

    name: str
    words: str
    """What it is, for headings."""
    unit: str = ""
    kind: Kind = "amount"
    """How it is coloured: a log-probability, an amount from 0 on, a number of either sign, a ratio
    around 1, or a number that is a name."""
    call: str = ANNOTATE
    """What makes it known."""
    worst: str = "largest"
    """What the token that stands out is called."""
    least: float = 0.0
    """Numbers with a sign: up to a tenth of it, one counts as none however small the others are."""


_ALL = (
    Quantity(
        "change", "log-prob after the update minus before", "nats", "signed", TWICE,
        worst="moved most",
    ),
    Quantity(
        "rollout_log_prob", "log-prob that the engine sampled with", "nats", "log_prob",
        "rollout = session.generate()", worst="least likely",
    ),
    Quantity(
        "trainer_log_prob", "log-prob in the trainer", "nats", "log_prob", worst="least likely",
    ),
    Quantity(
        "trainer_log_prob_before", "log-prob in the trainer, at the annotation before", "nats",
        "log_prob", TWICE, worst="least likely",
    ),
    Quantity(
        "difference", "log-prob in the trainer minus in the engine", "nats", "signed",
        worst="furthest apart", least=1e-3,
    ),
    Quantity(
        "ratio", "importance ratio: probability in the trainer over in the engine", "", "ratio",
        worst="furthest from 1", least=1e-3,
    ),
    Quantity(
        "entropy", "entropy of the trainer's choice at this place", "nats", "amount",
        worst="most undecided",
    ),
    Quantity(
        "experts_changed",
        "experts of all layers that the trainer would take in place of recorded ones", "", "amount",
        worst="most others",
    ),
    Quantity(
        "drafted", "place in the draft that it was accepted from; 0 for the model's own", "",
        "category", "rollout = session.generate()",
    ),
    Quantity("advantage", "advantage", "", "signed", BATCH),
    Quantity("loss", "share of the update's loss", "", "signed", BATCH),
)  # fmt: skip


def quantity(name: str, values: Sequence[float]) -> Quantity:
    """Quantity of a name; an unknown name gets one that fits its numbers."""
    if name in QUANTITIES:
        return QUANTITIES[name]
    if layer := _OF_LAYER.fullmatch(name):
        words = f"first of the experts in layer {layer[1]} that the engine took at this place"
        return Quantity(name, words, "", "category", RECORDED)
    return Quantity(name, name, kind="signed" if any(v < 0 for v in values) else "amount")


RECORDED = "rollout = session.generate()"
_OF_LAYER = re.compile(r"expert_of_layer_(\d+)")
MOST_LAYERS = 8
"""So many layers of a mixture of experts are named among what is known; each can be asked for."""


def _experts(sample: Sample, layer: int) -> list[float] | None:
    """First expert in a layer for each response token, by the token before, which predicts it."""
    record = sample.rollout_routed_experts
    if record is None or layer not in record.layers:
        return None
    first = record.array[len(sample.tokens) - sample.response_length - 1 :]
    column = first[:, record.layers.index(layer), 0].tolist()
    return [math.nan if expert == record.missing else float(expert) for expert in column]


QUANTITIES = {quantity.name: quantity for quantity in _ALL}
"""Quantities that have a description, the most telling first."""
_DERIVED: dict[str, tuple[str, str, Callable[[float, float], float]]] = {
    "change": ("trainer_log_prob", "trainer_log_prob_before", lambda new, old: new - old),
    "difference": ("trainer_log_prob", "rollout_log_prob", lambda ours, theirs: ours - theirs),
    "ratio": ("trainer_log_prob", "rollout_log_prob", lambda ours, theirs: ratio(ours - theirs)),
}


def ratio(log_ratio: float) -> float:
    """Ratio of a log-ratio, which is clamped to +-20."""
    if math.isnan(log_ratio):
        return math.nan
    return math.exp(max(-LARGEST_LOG_RATIO, min(log_ratio, LARGEST_LOG_RATIO)))


def find(sample: Sample, name: str) -> list[float] | None:
    """Values of a quantity, one per response token; None if the sample lacks them."""
    if name in sample.token_values:
        return sample.token_values[name]
    if name == "rollout_log_prob":
        log_probs = sample.rollout_log_probs
        return log_probs if log_probs and len(log_probs) == sample.response_length else None
    if name == "drafted":
        return None if sample.rollout_drafted is None else [*map(float, sample.rollout_drafted)]
    if layer := _OF_LAYER.fullmatch(name):
        return _experts(sample, int(layer[1]))
    if name not in _DERIVED:
        return None
    first, second, of = _DERIVED[name]
    left, right = find(sample, first), find(sample, second)
    if left is None or right is None:
        return None
    return [of(x, y) for x, y in zip(left, right, strict=True)]


def texts(sample: Sample) -> list[str]:
    """Text of each response token, as far as the sample knows it.

    From `metadata["token_texts"]`, else letter by letter where the response has as many letters
    as tokens, else the token ids.
    """
    texts = sample.metadata.get("token_texts")
    if isinstance(texts, Sequence) and len(texts) == sample.response_length:
        return [str(text) for text in texts]
    if sample.response_length and len(sample.response) == sample.response_length:
        return list(sample.response)
    return [str(token) for token in sample.response_tokens] if sample.response_length else []


def known(sample: Sample) -> list[str]:
    """The quantities that the sample knows, the most telling first."""
    if not sample.response_length:
        return []
    names = [*QUANTITIES, *(name for name in sample.token_values if name not in QUANTITIES)]
    if (record := sample.rollout_routed_experts) is not None:
        names += [f"expert_of_layer_{number}" for number in record.layers[:MOST_LAYERS]]
    return [name for name in names if find(sample, name) is not None]


def require(sample: Sample, name: str) -> list[float]:
    """A quantity's numbers, as `find` gives them.

    Raises:
        DataError: the sample does not know it. The message says what to call.
    """
    values = find(sample, name)
    if values is not None and sample.response_length:
        return values
    if not sample.response_length:
        raise DataError("The sample has no response tokens.", fix="generate a response first.")
    has = ", ".join(known(sample)) or "nothing"
    if name not in QUANTITIES:
        raise DataError(
            f"There is no quantity {name!r}; of its tokens this sample knows: {has}.",
            fix=did_you_mean(name, [*QUANTITIES, *sample.token_values]),
        )
    call = QUANTITIES[name].call
    raise DataError(
        f"The {name} of this sample's tokens is not known; it knows: {has}.",
        fix=call if call == TWICE else f"call `{call}` and ask a sample of the result.",
    )


def trained_mean(values: Sequence[float], mask: Sequence[int]) -> float:
    """Mean over the tokens that train; 0 without any."""
    trained = [value for value, active in zip(values, mask, strict=True) if active]
    if not trained or min(trained) == max(trained):
        return trained[0] if trained else 0.0
    return sum(trained) / len(trained)
