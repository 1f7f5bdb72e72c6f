"""Experiments, one for each cause: change one thing, and see whether the difference vanishes."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from kit.diagnostics.mismatch.experiments import Experiments, Finding, Rows
from kit.errors import DataError
from kit.reports import Cause
from kit.samples import Sample
from kit.weight_sync.verify import Checksums

if TYPE_CHECKING:
    from kit.trainer.probes import Quantized

RAW_LOG_PROBS = "SGLANG_RETURN_ORIGINAL_LOGPROB"
CUTS = ((1.0, 5), (1.0, 10), (1.0, 20), (1.0, 50), (0.95, -1), (0.9, -1), (0.8, -1))
"""(top_p, top_k) that are tried where the configuration has none."""


def amount(value: float) -> str:
    """Format a difference for evidence."""
    return f"{value:.2g}"


def weights(lab: Experiments) -> Finding:
    """Compare weight versions, and a checksum of each parameter on both sides."""
    trainer, engine = lab.report.trainer_version, lab.engine_version
    wrote = ", ".join(map(str, lab.report.rollout_versions)) or "unknown"
    lines = [f"weight versions: rollout {wrote}, engine {engine}, trainer {trainer}"]
    sums = compare_checksums(lab)
    lines += sums.lines()
    if any(version != trainer for version in lab.report.rollout_versions):
        # The words with both versions are in the report already.
        return Finding(tuple(lines), "stale_weights", lab.report.cause)
    if sums.different and all(".lora_" in name for name in sums.different):
        words = (
            f"Adapter: both sides have the same weights and claim version {trainer}, but "
            f"{len(sums.different)} of the adapters' matrices differ ({sums.different[0]}). The "
            f"engine has another adapter than the trainer. Call session.sync() and generate again."
        )
        return Finding(tuple(lines), "adapter", words)
    if sums.different:
        names = ", ".join(sums.different[:3]) + (" ..." if len(sums.different) > 3 else "")
        words = (
            f"Stale weights: both sides claim version {trainer}, but {len(sums.different)} of "
            f"{sums.compared} parameters differ ({names}). Something changed one side's weights "
            f"without a hand-over. Call session.sync() and generate again."
        )
        return Finding(tuple(lines), "stale_weights", words)
    if lab.config.engine.rounds_alone:
        return _rounded(lab, lines)
    if done := lab.stack.probe("disturbance"):
        lines.append(f"the engine's matrices are the trainer's, {done}")
        words = (
            f"Precision: the engine generates with the trainer's matrices {done}, as "
            f"engine.weight_bits and engine.weight_noise ask. Correct for it with "
            f"training.use_tis or training.mis, or take the setting out."
        )
        return Finding(tuple(lines), "precision", words)
    return Finding(tuple(lines))


def _rounded(lab: Experiments, lines: list[str]) -> Finding:
    """Tell apart what rounding weights, activations, and keys and values does in the engine alone.

    Each is put into Transformers with the trainer's weights, beside those before it; what is left
    is no matter of theirs.
    """
    how, cache = lab.config.engine.quantization, lab.config.engine.kv_cache_dtype
    steps: list[tuple[str, Quantized, str]] = []
    if how:
        steps.append((f"weights in {how.method}", "weights", "auto"))
    if how and how.method == "fp8":
        steps.append(("activations in fp8", "all", "auto"))
    if cache != "auto":
        steps.append((f"keys and values in {cache}", "all" if how else "own", cache))
    changes: list[str] = []
    gap = lab.observed
    for what, quantized, kept in steps:
        rows = lab.plainly([lab.stack.dtype], quantized=quantized, cache=kept)
        gap = lab.gap(rows[lab.stack.dtype], lab.recorded)
        too = " too" if changes else ""
        lines.append(f"the trainer with the engine's {what}{too}: mean difference {amount(gap)}")
        changes.append(f"with {what}{too} it goes to {amount(gap)}")
    if not lab.explains_difference(gap):
        _, quantized, kept = steps[-1]
        if lab.stack.dtype != "bfloat16" or gap > lab.observed / 2:
            return Finding(tuple(lines))
        # A last bit can decide how an activation is rounded, which counts as a whole step of FP8.
        rows = lab.plainly(["bfloat16", "float32"], quantized=quantized, cache=kept)
        own = lab.gap(rows["bfloat16"], rows["float32"])
        lines.append(f"that trainer against itself in float32: mean difference {amount(own)}")
        if gap > 2 * own:
            return Finding(tuple(lines))
        changes.append(f"where bfloat16 alone makes {amount(own)}")
    asked = ["engine.quantization"] if how else []
    asked += ["engine.kv_cache_dtype"] if cache != "auto" else []
    instead = f"leave {asked[-1]} out"
    if how:
        instead = f"train through the same weights: model.quantization: {how.method}"
    words = (
        f"Precision: the engine rounds what the trainer does not, as {' and '.join(asked)} "
        f"ask{'' if len(asked) > 1 else 's'}. The mean difference is {amount(lab.observed)}; "
        f"{', '.join(changes)}. Correct for it with training.use_tis or training.mis, or {instead}."
    )
    return Finding(tuple(lines), "precision", words)


def compare_checksums(lab: Experiments) -> Checksums:
    """Compare checksums of both sides; none if an engine's devices each hold a part of a weight.

    Raises:
        StackError: the engine has no checksums.
    """
    if lab.stack.settings.config.engine.tensor_parallel > 1:
        return Checksums(0, [], [], "", [])
    return lab.stack.compare_weights()


def tokens(lab: Experiments) -> Finding:
    """Check that the log-probs belong to these tokens, and the prompt to the chat template."""
    uneven = [s for s in lab.samples if len(s.rollout_log_probs or []) != s.response_length]
    renamed = [s for s in lab.samples if _reads_otherwise(lab, s)]
    prompts = [_rendered(lab, s) for s in lab.samples]
    other = sum(p != s.prompt_tokens for p, s in zip(prompts, lab.samples, strict=True))
    lines = [
        f"log-probs and tokens: {len(uneven)} samples have another number of the one than of the "
        f"other, {len(renamed)} read otherwise than when they were written",
        f"prompts: {other} are not what the chat template makes of them",
    ]
    if other:
        after = lab.with_tokens(prompts, [s.response_tokens for s in lab.samples]).agreement()
        lines.append(f"with prompts rendered anew: mean difference {amount(after)}")
        if lab.explains_difference(after):
            words = (
                f"Chat template: {other} of {len(lab.samples)} prompts are not what the session's "
                f"template makes of them; with prompts rendered anew the difference goes from "
                f"{amount(lab.observed)} to {amount(after)}. Give trainer and engine the same "
                f"token ids: keep those of the rollout, or render with data.apply_chat_template "
                f"and data.system_prompt as they were."
            )
            return Finding(tuple(lines), "chat_template", words)
    if not (uneven or renamed):
        return Finding(tuple(lines))
    words = (
        "Tokenisation: the tokens of the samples are not those that the engine wrote. Text that "
        "was decoded and encoded again may have other tokens, and lacks the end-of-sequence token. "
        "Train on the ids of the rollout; never encode its text again."
    )
    after = lab.with_tokens(
        [s.prompt_tokens for s in lab.samples], [_as_written(lab, s) for s in lab.samples]
    ).agreement()
    lines.append(f"with the tokens as they were written: mean difference {amount(after)}")
    return Finding(tuple(lines), "tokenization", words)


def _reads_otherwise(lab: Experiments, sample: Sample) -> bool:
    texts = sample.metadata.get("token_texts")
    if texts is not None:
        return list(texts) != [lab.sampler.token_text(t) for t in sample.response_tokens]
    return not lab.sampler.reader.could_read(sample.response_tokens, sample.response)


def _rendered(lab: Experiments, sample: Sample) -> list[int]:
    """Tokens of the prompt, rendered again; the sample's own if it has no prompt to render."""
    try:
        return (sample.prompt and lab.sampler.render(sample.prompt)) or sample.prompt_tokens
    except DataError:
        return sample.prompt_tokens


def _as_written(lab: Experiments, sample: Sample) -> list[int]:
    """Tokens of the response from its recorded texts, as far as each is one token."""
    tokenizer = lab.sampler.tokenizer
    texts = sample.metadata.get("token_texts") or []
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    if ids and all(len(one) == 1 for one in ids):
        return [one[0] for one in ids]
    missing = len(sample.rollout_log_probs or []) - sample.response_length
    return sample.response_tokens + [tokenizer.eos_token_id] * (missing == 1)


def operators(lab: Experiments) -> Finding:
    """Find the first part of the model that differs, where all should agree to the bit."""
    if not lab.config.training.true_on_policy:
        return Finding(())
    name, agree = lab.stack.first_difference(lab.samples[0].tokens)
    if not name:
        return Finding((f"all {agree} parts of the model agree to the bit as a sample is read",))
    line = f"{agree} parts of the model agree to the bit, the first that differs is {name}"
    words = (
        f"Operators: engine and trainer agree to the bit up to {name}, which they compute "
        f"otherwise. Under training.true_on_policy every operator has to be one of kit.operators."
    )
    return Finding((line,), "precision", words)


def repetition(lab: Experiments) -> Finding:
    """Run a pass twice: a model that drops something at random does not repeat itself."""
    first, second = (lab.recompute(seed=seed) for seed in (1, 2))
    apart = lab.gap(first, second)
    lines = (f"the trainer's pass repeated: mean difference {amount(apart)}",)
    if not apart > max(lab.report.warn_above, lab.observed / 10):
        return Finding(lines)
    return Finding(lines, "dropout", _dropout_words(lab, "the same pass twice", apart))


def training_mode(lab: Experiments) -> Finding:
    """Run a pass in training mode, in which an update computes."""
    still, moving = (lab.recompute(training_mode=mode) for mode in (False, True))
    apart = lab.gap(still, moving)
    lines = (f"the trainer in training mode against evaluation: mean difference {amount(apart)}",)
    if not apart > max(lab.report.warn_above, 4 * lab.rounding):
        return Finding(lines)
    return Finding(lines, "dropout", _dropout_words(lab, "a pass as an update makes it", apart))


def _dropout_words(lab: Experiments, what: str, apart: float) -> str:
    settings = lab.stack.probe("dropouts")
    where = f" The model has {', '.join(settings[:3])}." if settings else ""
    return (
        f"Dropout or training mode: {what} gives other log-probs (mean difference {amount(apart)})."
        f"{where} The engine never drops anything, and what config.json says is switched off: this "
        "is in the model's own code."
    )


def prefix_cache(lab: Experiments) -> Finding:
    """Compare the engine's log-probs with its prefix cache and with one that was just filled.

    A sequence that is computed in two parts is rounded otherwise than in one: where numbers are
    coarse that alone looks like other weights, so it is measured.
    """
    present, refilled, fresh = (lab.rescore(cache=c) for c in ("present", "refilled", "none"))
    apart = _apart(lab, present, refilled)
    itself = _apart(lab, refilled, fresh)
    raw = lab.sampled([(1.0, 1.0, -1)])[0]
    against = max(lab.gap(raw, _scores(rows)) for rows in fresh)
    lines = (
        f"the engine's log-probs with its prefix cache, and with one filled anew: mean difference "
        f"{amount(apart)}",
        f"the engine against itself, its cache filled anew and without one: {amount(itself)}",
        f"the engine computing these tokens anew against the trainer, temperature 1: "
        f"{amount(against)}",
    )
    if not apart > max(lab.report.warn_above, 3 * itself):
        return Finding(lines)
    words = (
        "Stale prefix cache: the engine goes on from prompts that it computed with other weights; "
        "without the cache its log-probs change. Call session.sync(), which flushes it, and "
        "generate again; whatever else hands over weights must flush it too."
    )
    return Finding(lines, "stale_prefix_cache", words)


def _apart(lab: Experiments, one: list[list[object]], other: list[list[object]]) -> float:
    """Largest mean difference of an engine's log-probs, over all engines."""
    return max(lab.gap(_scores(a), _scores(b)) for a, b in zip(one, other, strict=True))


def _scores(rescored: list[object]) -> Rows:
    return [row.log_probs for row in rescored]  # type: ignore[attr-defined]


def sampling(lab: Experiments) -> Finding:
    """Try other temperatures, and log-probs after top-k and top-p, to see which fit the rollout."""
    best, after, same = fitting_temperature(lab)
    lines = [
        f"the rollout fits temperature {best:.3g} best: mean difference {amount(after)} "
        f"(trainer at {lab.temperature:g}: {amount(lab.observed)})"
    ]
    if lab.explains_difference(same):
        lines.append("at the trainer's temperature they agree, each sample computed by itself")
        return Finding(tuple(lines))
    if lab.explains_difference(after):
        kind, words = _temperature_words(lab, best, after)
        return Finding(tuple(lines), kind, words)
    settings = lab.config.rollout
    own = (settings.top_p, settings.top_k)
    cuts = (own,) if own != (1.0, -1) else CUTS
    ways = lab.sampled([(lab.temperature, *cut) for cut in cuts])
    for (top_p, top_k), rows in zip(cuts, ways, strict=True):
        after = lab.gap(rows, lab.recorded)
        if lab.explains_difference(after):
            cut = f"top_k {top_k}" if top_k > 0 else f"top_p {top_p:g}"
            lines.append(f"after {cut}, renormalised: mean difference {amount(after)}")
            words = (
                f"Processed log-probs: the rollout's are those after {cut} and renormalisation, "
                f"the trainer's are of the whole vocabulary. Have the engine return log-probs "
                f"before these cuts, or sample without them (rollout.top_p 1, rollout.top_k -1)."
            )
            return Finding(tuple(lines), "processed_log_probs", words)
    lines.append("log-probs after top-k or top-p do not fit it")
    return Finding(tuple(lines))


def _temperature_words(lab: Experiments, best: float, after: float) -> tuple[Cause, str]:
    seen = (
        f"the rollout's log-probs fit temperature {best:.3g} (mean difference {amount(after)}), "
        f"the trainer computes at {lab.temperature:g}"
    )
    if abs(best - 1) < 1e-3 and os.environ.get(RAW_LOG_PROBS, "").lower() in ("1", "true"):
        return "processed_log_probs", (
            f"Processed log-probs: {seen}. {RAW_LOG_PROBS} is set, so the engine returns "
            f"log-probs before temperature. Unset it and start the session again."
        )
    return "temperature", (
        f"Sampling temperature: {seen}. Generate at rollout.temperature, without temperature= of "
        f"your own, for what is to be trained on. Greedy responses count as temperature 1."
    )


def fitting_temperature(lab: Experiments) -> tuple[float, float, float]:
    """Find the temperature that fits best: (it, mean difference there, and at the trainer's)."""
    tried: dict[float, float] = {}

    def attempt(temperatures: list[float]) -> float:
        new = [t for t in temperatures if t not in tried]
        for temperature, rows in zip(new, lab.sampled([(t, 1.0, -1) for t in new]), strict=True):
            gap = lab.gap(rows, lab.recorded)
            tried[temperature] = math.inf if math.isnan(gap) else gap
        return min(tried, key=lambda t: tried[t])

    likely = {1.0, lab.temperature, lab.config.evaluation.temperature or 1.0}
    best = attempt([*likely, *(0.1 * 1.25**i for i in range(19))])
    width = 1.25
    while width > 1.0005 and not tried[best] <= lab.report.warn_above:
        width **= 0.25
        best = attempt([best * width**i for i in (-3, -2, -1, 1, 2, 3)])
    return best, tried[best], tried[lab.temperature]


def packing(lab: Experiments) -> Finding:
    """Compare with each sample alone, and with Transformers' own attention."""
    alone = lab.gap(lab.recompute(packed=False), lab.recorded)
    lines = [f"the trainer with each sample by itself: mean difference {amount(alone)}"]
    if lab.explains_difference(alone):
        words = (
            f"Packing: with each sample by itself the difference goes from {amount(lab.observed)} "
            f"to {amount(alone)}, so attention or positions go wrong where samples share a row. "
            f"The model has to take position_ids as given and attend through the `kit_packed` "
            f"function; look at its own modelling code (model.trust_remote_code)."
        )
        return Finding(tuple(lines), "packing", words)
    plain = lab.gap(lab.plainly([lab.stack.dtype])[lab.stack.dtype], lab.recorded)
    lines.append(f"Transformers alone, its own attention: mean difference {amount(plain)}")
    if lab.explains_difference(plain):
        words = (
            f"Attention or positions: Transformers with the same weights and its own attention "
            f"agrees with the rollout ({amount(plain)}), the trainer does not, packed or not. "
            f"The model needs something that `kit_packed` attention does not do, such as a sliding "
            f"window, attention sinks or soft caps: train another model."
        )
        return Finding(tuple(lines), "packing", words)
    return Finding(tuple(lines))


def differing(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """Share of (token, layer) whose experts differ, whatever their order."""
    pairs = zip(ours, theirs, strict=True)
    differ = [(np.sort(a) != np.sort(b)).any(-1).ravel() for a, b in pairs]
    return float(np.concatenate(differ).mean()) if differ else 0.0


def _takes_another_number(ours: Sequence[Any], theirs: Sequence[Any]) -> Finding | None:
    """The finding that both sides take another number of experts; None if they do not."""
    takes, wanted = (rows[0].shape[2] for rows in (theirs, ours))
    if takes == wanted:
        return None
    line = f"experts: the engine sends a token to {takes} of a layer, the trainer to {wanted}"
    words = (
        f"Routing in the mixture of experts: the engine sends a token to {takes} experts of a "
        f"layer, the trainer to {wanted}, so they compute other models. Leave num_experts_per_tok "
        f"out of engine.extra (json_model_override_args)."
    )
    return Finding((line,), "expert_routing", words)


def routing(lab: Experiments) -> Finding:
    """Compare the experts of both sides, and try the trainer with the engine's choice."""
    own = lab.routing()
    if own is None:
        return Finding(("the model has no experts to route to",))
    theirs = [row.experts for row in lab.rescore(cache="none", experts=True)[0]]
    if any(row is None for row in theirs):
        hint = "set engine.extra {enable_return_routed_experts: true} to have them compared"
        return Finding((f"the engine does not say where it routed tokens: {hint}",))
    if other_number := _takes_another_number(own.experts, theirs):
        return other_number
    share = differing(own.experts, theirs)
    after = lab.gap(lab.routing(theirs).log_probs, lab.recorded)
    lines = (
        f"experts: both sides choose differently for {share:.1%} of tokens and layers",
        f"the trainer with the engine's experts: mean difference {amount(after)}",
    )
    if not (share and lab.explains_difference(after)):
        return Finding(lines)
    words = (
        f"Routing in the mixture of experts: both sides choose differently for {share:.1%} of "
        f"tokens and layers; with the engine's choice the trainer's difference goes from "
        f"{amount(lab.observed)} to {amount(after)}. Start with "
        f"training.use_rollout_routing_replay: true, which has the trainer take the engine's "
        f"experts. Where the share is large, compare the router's settings on both sides first "
        f"(num_experts_per_tok, engine.extra)."
    )
    return Finding(lines, "expert_routing", words)


def precision(lab: Experiments) -> Finding:
    """Compare the effect of rounding alone with the difference of both sides.

    Where both compute in bfloat16 their weights are the same, and only what is computed is rounded.
    """
    rows = lab.plainly(["bfloat16", "float32", "float64"])
    fine = lab.gap(rows["float32"], rows["float64"])
    other = compare_checksums(lab).engine_dtype
    dtype = lab.stack.dtype
    both = dtype == "bfloat16" and not other
    codes = lab.config.quantization
    held = f"{codes.method} codes with scales" if codes else other or dtype
    coarse = lab.rounding if both else lab.gap(rows["bfloat16"], rows["float32"])
    lines = (
        f"rounding to bfloat16 moves log-probs by {amount(coarse)}, to float32 by {amount(fine)}; "
        f"both sides are {amount(lab.observed)} apart",
        f"the trainer computes in {dtype}, the engine's weights are {held}",
    )
    size = coarse if "bfloat16" in (dtype, other) else fine
    if not lab.observed <= 4 * size:
        return Finding(lines)
    if other:
        words = (
            f"Precision: the trainer computes in {dtype}, the engine in {other}, and the "
            f"difference is of the size that this rounding makes. Set model.dtype for both, and "
            f"leave dtype out of engine.extra."
        )
    else:
        words = (
            f"Precision: the difference is of the size that rounding to {dtype} makes, on both "
            f"sides. Raise mismatch.warn_above where that is good enough, or compute in a wider "
            f"model.dtype."
        )
    return Finding(lines, "precision", words)
