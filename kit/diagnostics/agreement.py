"""Whether trainer and engine compute the model that its files describe, seen before training.

Transformers' own forward pass (float32, eager attention, one sequence after the other) is the
measure. A few sequences, longer than any sliding window that matters, are scored by the trainer as
it trains, by the engine as it reads them and as it writes them, and by Transformers. Then the
engine's weights are erased and synced: each has to be what it was. Other weights are synced: the
engine has to compute with those, and with nothing that it kept of the first. What was seen to agree
is noted beside the kernels in the user's cache, by the model's files, versions and settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.config import SessionConfig
from kit.diagnostics.mismatch import curves
from kit.errors import ModelError, StackError
from kit.models.adapters import adapter_directory
from kit.models.source import stored_parameters
from kit.utils.files import replace_file
from kit.utils.interrupts import held
from kit.utils.reading import read_json
from kit.utils.versions import versions

if TYPE_CHECKING:
    from kit.rollout.sampler import PromptSampler
    from kit.stack.stack import Stack
    from kit.trainer.probes import Samples

Rows = Sequence[Sequence[float]]

SEQUENCES, WRITTEN = 4, 16
"""So many sequences are scored; the engine writes so many tokens at the end of each."""
SHORTEST = 64
"""Tokens of a sequence, where nothing asks for more."""
BOUNDS = {"float32": 1e-4, "tf32": 5e-3, "fp8": 5e-3, "fp8 twice": 0.02, "bfloat16": 0.02}
"""Mean |difference| of log-probs from Transformers' that rounding may cause, in nats a token. `fp8`
is float32 with activations, or keys and values, in FP8, where a last bit that differs may move one
by a whole step; `fp8 twice` is float32 with both."""
CHANGED = 10.0
"""In float32, bounds are so many times as large for the weights of another model."""
ROUNDINGS = 4.0
"""In bfloat16, differences up to so many times what rounding does to Transformers itself agree."""
WINDOWS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")
"""Numbers of tokens in a model's configuration beyond which it computes in another way."""
FEATURES = (
    "logits_scaling",
    "logit_scale",
    "lm_head_multiplier",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "rope_scaling",
    "sliding_window",
    "attention_chunk_size",
    "attention_multiplier",
    "residual_multiplier",
    "embedding_multiplier",
)
"""Settings of a model's configuration that are easily left out."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Mean |difference| of log-probs from Transformers', in nats a token."""

    trainer: float
    prefill: float
    """Of the engine where it reads a sequence in one go."""
    decode: float
    """Of the engine where it writes token by token."""
    bound: float
    """What rounding may cause."""
    longest: int
    """Tokens of the longest sequence."""
    lost: tuple[str, ...]
    """Parameters of the engine that a sync does not give it, by SGLang's names."""
    rounding: float = 0.0
    """What computing in bfloat16 does to Transformers itself; 0 in float32."""
    reshaped: tuple[str, ...] = ()
    """Parameters that arrive, and that the engine keeps in a form of its own."""
    onset: str = ""
    """Where the difference begins, if that is at a number of the model's configuration."""
    resynced: float = 0.0
    """Of the engine, reading, after a sync of other weights; 0 where a sync leaves the weights."""
    resynced_bound: float = 0.0
    """What rounding may cause with those."""
    exact: bool = False
    """Whether the engine's log-probs, read and written, are the trainer's to the bit."""

    @property
    def agrees(self) -> bool:
        """Whether all computations are the same and every weight arrives."""
        gaps = (self.trainer, self.prefill, self.decode)
        follows = self.resynced <= self.resynced_bound
        return not self.lost and follows and all(gap <= self.bound for gap in gaps)

    def problem(self, name: str, hints: Sequence[str]) -> ModelError:
        """Describe what does not agree.

        Args:
            name: the model's.
            hints: what its configuration has that may be the cause.
        """
        sides = {
            "the trainer": self.trainer,
            "the engine, reading,": self.prefill,
            "the engine, writing,": self.decode,
        }
        off = [f"{side} is {gap:.2g} off" for side, gap in sides.items() if not gap <= self.bound]
        what, why = [], []
        if off:
            what.append(f"{name} is computed otherwise than Transformers does: {', '.join(off)}")
            why.append(
                f"Mean difference of log-probs in nats a token, over {SEQUENCES} sequences of up "
                f"to {self.longest} tokens; rounding may cause {self.bound:.2g}."
            )
            if self.onset:
                why.append(f"It begins after {self.onset} tokens.")
            elif hints:
                why.append(f"Its config.json has {', '.join(hints)}.")
        if not self.resynced <= self.resynced_bound:
            what.append(
                f"the engine goes on computing {name} with something that it made of its first "
                "weights"
            )
            why.append(
                f"After a sync of other weights it is {self.resynced:.2g} nats a token off, where "
                f"rounding may cause {self.resynced_bound:.2g}."
            )
        if self.lost:
            shown = ", ".join(self.lost[:3]) + (" ..." if len(self.lost) > 3 else "")
            what.append(
                f"{len(self.lost)} weights of {name} would not reach the engine after an update "
                f"({shown})"
            )
        window = ", or keep prompt and response within the window if that is the cause"
        text = "; ".join(what)
        return ModelError(
            f"{'T' + text[1:] if text.startswith('the ') else text}.",
            why=" ".join(why),
            fix=f"train another model{window if off else ''}. mismatch.on_start: warn starts all "
            "the same, and trains something else than the model. docs/models.md says how a family "
            "is made known.",
        )


def check_agreement(config: SessionConfig, stack: Stack, sampler: PromptSampler) -> None:
    """Check that the model is computed and synced rightly, unless that was seen before.

    Equal bits, which hang on drivers and compilers too, are looked at in every start.

    Raises:
        ModelError: it is not, and `mismatch.on_start` says `refuse`; or bits are to be equal and
            are not.
    """
    how, exact = config.mismatch.on_start, config.training.true_on_policy
    longest = sequence_length(
        Path(stack.model.path), stack.model.context_length, tokens_used(sampler)
    )
    record = _record(stack, longest)
    if how == "skip":
        return
    if record.is_file() and not exact:
        with suppress(ValueError, TypeError):  # not whole: it is looked at again
            seen = Agreement(**read_json(record))
            _keep(stack, seen)
            return
    try:
        agreement = measure(stack, sampler, longest)
    except StackError as error:
        raise ModelError(
            f"{config.model.name} cannot be computed by trainer and engine.",
            why=str(error),
            fix="train another model; mismatch.on_start: skip does not try it at the start.",
        ) from error
    if config.engine.disturbed:
        stack.sync(stack.trainers.version)
    if agreement.agrees and not exact:
        with suppress(OSError):  # then it is looked at again
            record.parent.mkdir(parents=True, exist_ok=True)
            replace_file(record, json.dumps(asdict(agreement)) + "\n")
    _keep(stack, agreement)
    if exact and not agreement.exact and (agreement.agrees or how == "warn"):
        raise _not_exact(config.model.name, *stack.first_difference(_prompts(sampler, longest)[0]))
    if agreement.agrees:
        return
    problem = agreement.problem(config.model.name, features(Path(stack.model.path)))
    if how == "refuse" or agreement.lost:  # what a sync cannot give back, the engine has no more
        raise problem
    warnings.warn(str(problem), RuntimeWarning, stacklevel=2)


def _not_exact(name: str, part: str, agree: int) -> ModelError:
    where = f"The first part that differs is {part}." if part else f"All {agree} parts agree."
    return ModelError(
        f"Trainer and engine compute {name} with other bits, and training.true_on_policy is set.",
        why=f"Log-probs of {SEQUENCES} sequences are not equal. {where}",
        fix="leave training.true_on_policy off, and tell us of it, with the model's config.json.",
    )


def _keep(stack: Stack, agreement: Agreement) -> None:
    """Keep with the stack what later comparisons of its two sides need to know."""
    stack.description["reshaped"] = agreement.reshaped


def measure(stack: Stack, sampler: PromptSampler, longest: int) -> Agreement:
    """Score sequences with trainer, engine and Transformers, and try a sync.

    Args:
        stack: where trainer and engine hold the weights of the model's files.
        sampler: whose prompts begin the sequences.
        longest: tokens of the longest sequence.
    """
    from kit.messages import SamplingSettings
    from kit.trainer.probes import Samples

    config = stack.settings.config
    if config.engine.disturbed:
        stack.sync(stack.trainers.version, exact=True)
    prompts = _prompts(sampler, longest)
    written: dict[int, Any] = {}
    settings = SamplingSettings(temperature=1.0, max_new_tokens=WRITTEN)
    for part in stack.generate(prompts, settings, list(range(len(prompts))), at_once=True):
        written.update(part)
    answers = [written[place] for place in range(len(prompts))]
    tokens = [[*p, *answer.tokens] for p, answer in zip(prompts, answers, strict=True)]
    samples = Samples(tokens, [len(row) - 1 for row in tokens])
    coarse = "bfloat16" in (stack.dtype, str(config.engine.extra.get("dtype")))
    dtypes = ["float32", "bfloat16"] if coarse else ["float32"]
    exact, engines, others, rounding = _plainly(stack, samples, dtypes)
    trained = stack.probe("recompute", samples, 1.0)
    read = stack.rescore(samples.tokens, samples.response_lengths, cache="none")[0]
    bound = BOUNDS["bfloat16" if coarse else _exactness(config, stack.device)]
    bound = max(bound, ROUNDINGS * rounding)
    prefill: Rows = [row.log_probs for row in read]
    tails = _tails(engines, answers)
    gaps = {
        "trainer": _gap(trained, exact),
        "prefill": _gap(prefill, engines),
        "decode": _gap([answer.log_probs for answer in answers], tails),
    }
    pairs = (trained, exact), (prefill, engines)
    worst = max(pairs, key=lambda pair: curves.badness(_gap(*pair)))
    onset = _onset(Path(stack.model.path), *worst, bound)
    lost = tuple(stack.lost_weights())
    resynced = (0.0, 0.0)
    if others and not lost:
        resynced = _after_another_sync(stack, samples, others, bound)
    alone = config.engine.tensor_parallel == 1  # else each device has a part of every weight
    return Agreement(
        **gaps,
        bound=bound,
        rounding=rounding,
        longest=max(map(len, tokens)),
        lost=lost,
        reshaped=tuple(stack.compare_weights().different) if alone and not lost else (),
        onset=onset,
        resynced=resynced[0],
        resynced_bound=resynced[1],
        exact=_gap(prefill, trained) == 0.0
        and _gap([a.log_probs for a in answers], _tails(trained, answers)) == 0.0,
    )


def _plainly(
    stack: Stack, samples: Samples, dtypes: Sequence[str]
) -> tuple[Rows, Rows, Sequence[Rows], float]:
    """Transformers' log-probs: (as the trainer, as the engine, as `_after_another_sync` takes them)
    and what rounding to the last of the dtypes does to them, in nats a token.
    """
    config = stack.settings.config
    follows = not stack.sending.adapters  # a sync brings the weights, not adapters alone
    how: tuple[Any, ...] = (True, None, "own", "auto", follows)
    plain = stack.probe("plainly", samples, dtypes, 1.0, *how)
    exact, *rounded = plain[:: 1 + follows]
    rounding = _gap(rounded[0], exact) if rounded else 0.0
    engines = exact
    if config.engine.rounds_alone:  # what it computes is another thing than what the trainer does
        quantized = "all" if config.engine.quantization else "own"
        how = True, None, quantized, config.engine.kv_cache_dtype, follows
        plain = stack.probe("plainly", samples, dtypes, 1.0, *how)
        engines, *rounded = plain[:: 1 + follows]
        if rounded:  # last bits move its numbers in FP8 by whole steps
            rounding = max(rounding, _gap(rounded[0], engines))
    return exact, engines, plain[1::2] if follows else [], rounding


def _after_another_sync(
    stack: Stack, samples: Samples, plain: Sequence[Rows], bound: float
) -> tuple[float, float]:
    """Difference of the engine from Transformers with other weights: (it, its bound).

    What the engine has kept of the first ones, in whatever form, then shows. Afterwards it has the
    trainers' weights again.

    Args:
        stack: where trainer and engine hold the same weights.
        samples: the tokens.
        plain: Transformers' log-probs with other signs; where the engine is coarser than float32,
            then those of its dtype.
        bound: what rounding may cause with the model's own weights.
    """
    version = stack.trainers.version
    with held():
        stack.probe("turn_signs", True)
        try:
            stack.sync(version, exact=True)
            read = stack.rescore(samples.tokens, samples.response_lengths, cache="none")[0]
        finally:
            stack.probe("turn_signs", False)
            stack.sync(version, exact=True)
    exact, *rounded = plain
    # Nobody has trained this model to be calm: what is rounded may grow in it.
    larger = ROUNDINGS * _gap(rounded[0], exact) if rounded else CHANGED * bound
    return _gap([row.log_probs for row in read], exact), max(bound, larger)


def _exactness(config: SessionConfig, device: str) -> str:
    """Which of `BOUNDS` holds where all weights and computations are in float32."""
    weights = config.quantization is not None and config.quantization.method == "fp8"
    cache = config.engine.kv_cache_dtype == "fp8_e4m3"
    if weights or cache:
        return "fp8 twice" if weights and cache else "fp8"
    return "tf32" if device == "cuda" else "float32"


def _tails(rows: Rows, answers: Sequence[Any]) -> Rows:
    """Log-probs of the tokens that the engine wrote, of each sequence."""
    pairs = zip(rows, answers, strict=True)
    return [row[len(row) - len(answer.tokens) :] for row, answer in pairs]


def sequence_length(model: Path, context: int, used: int) -> int:
    """Tokens that a sequence needs to be longer than every window the session can meet.

    Args:
        model: the model's directory.
        context: the most tokens it may have.
        used: the most tokens of a prompt with its response.
    """
    beyond = [tokens + 2 * WRITTEN for tokens in windows(model).values() if tokens < used]
    return min(max(SHORTEST, *beyond) if beyond else SHORTEST, context)


def windows(model: Path) -> dict[str, int]:
    """Numbers of tokens in a model's configuration beyond which it computes in another way."""
    config = _config(model)
    nested = [config, config.get("rope_scaling"), config.get("rope_parameters")]
    found = {
        f"{key} {value}": value
        for settings in nested
        if isinstance(settings, dict)
        for key, value in settings.items()
        if key in WINDOWS and isinstance(value, int) and value > 0
    }
    if config.get("use_sliding_window") is False:
        found = {key: value for key, value in found.items() if "sliding" not in key}
    return found


def features(model: Path) -> list[str]:
    """What a model's configuration has that an implementation easily leaves out."""
    config = _config(model)
    named = [f"{key} {config[key]}" for key in FEATURES if config.get(key) not in (None, 1, 1.0)]
    stored = {name for file in model.glob("*.safetensors") for name in stored_parameters(file)}
    if "lm_head.bias" in stored:
        named.append("a bias of the output layer")
    if config.get("tie_word_embeddings") and "lm_head.weight" in stored:
        named.append("tie_word_embeddings true, and an lm_head.weight in its files all the same")
    return named


def _config(model: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(model / "config.json", unique=False)
    return settings


def tokens_used(sampler: PromptSampler) -> int:
    """The most tokens of a prompt with its response that a session can have."""
    longest = max((len(tokens) for tokens in sampler.rendered.values()), default=SHORTEST)
    return longest + sampler.max_response_len


def _prompts(sampler: PromptSampler, longest: int) -> list[list[int]]:
    """Beginnings of the sequences: the session's prompts, repeated; each a little shorter."""
    rows = list(islice(sampler.train.rows, SEQUENCES))
    texts = [sampler.tokenize(row) for row in rows]
    prompts = []
    for number in range(SEQUENCES):
        # Shorter ones tell packing apart; all of them stay beyond the windows.
        length = max(longest - WRITTEN - 3 * number, 1)
        endless = cycle(token for text in texts[number % len(texts) :] + texts for token in text)
        prompts.append(list(islice(endless, length)))
    return prompts


def _gap(one: Rows, other: Rows) -> float:
    rows = zip(one, other, strict=True)
    return curves.mean([abs(a - b) for pair in rows for a, b in zip(*pair, strict=True)])


def _onset(model: Path, rows: Rows, exact: Rows, bound: float) -> str:
    """The setting at whose number of tokens the difference begins; "" if there is none such."""
    for name, tokens in windows(model).items():
        before = _gap([row[: tokens - 1] for row in rows], [row[: tokens - 1] for row in exact])
        after = _gap([row[tokens - 1 :] for row in rows], [row[tokens - 1 :] for row in exact])
        if before <= bound < after:
            return name
    return ""


def _record(stack: Stack, longest: int) -> Path:
    """Where it is noted that this model agrees, computed in this way."""
    model, config = Path(stack.model.path), stack.settings.config
    files = [model / "config.json", *sorted(model.glob("*.safetensors*"))]
    if (adapters := config.model.lora) and adapters.adapter_path is not None:
        files += sorted(adapter_directory(adapters).glob("adapter_*"))
    about = [
        [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files],
        versions(),
        [field.name for field in fields(Agreement)],  # what was not looked at before, is now
        (stack.device, stack.dtype, longest, stack.model.context_length),
        (config.engine.model_dump(mode="json"), config.training.num_trainers),
        adapters and adapters.model_dump(mode="json"),
        config.model.quantization and config.model.quantization.model_dump(mode="json"),
    ]
    key = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "kit" / "agreement" / f"{key[:32]}.json"
