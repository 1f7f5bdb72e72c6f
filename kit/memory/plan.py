"""`MemoryPlan`: what each phase of an iteration holds, decided before anything starts.

Three phases share one device:

    generate   engine: weights, KV cache, graphs       trainer: weights, optimizer, or asleep
    update     trainer: all of it, activations         engine: KV cache and weights, or asleep
    sync       trainer's weights, buckets, engine's weights; the KV cache as in update

The plan takes what costs least time: nothing sleeps where everything fits; then the engine's KV
cache is let go during updates, then its weights; smaller micro-batches and recomputation come
next; the trainer moves to host memory while the engine generates where the KV cache would
otherwise hold less than half of a rollout. All sizes are bytes. Where a session has several
devices, the plan is of one of them, or of one trainer's and one engine's.

Where no plan fits, `ways_out` looks for settings that would make it fit, and tries each before it
offers it. `memory_plan` and `plan_for` make the plan of a session, also on a machine without GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.memory.sizes import CONTEXT, KEPT, Recompute, Sizes
from kit.models.adapters import AdapterShape
from kit.models.source import ModelShape, ModelSource, find
from kit.utils.display import Shown
from kit.utils.formatting import in_gib
from kit.utils.hardware import GIB, Card

PROMPT_TOKENS = 512
"""Allowed for a prompt, whose length is not known before the data is tokenised."""
MICRO_BATCH = 16384
"""Tokens a micro-batch where the setting is left open and there is room."""
SPARE = 0.04
"""Share of the device that is kept in reserve for fragmentation."""
COMPILED_FROM = 100_000_000
"""Parameters from which compiling the layers pays for the half minute that it takes once."""

Parts = tuple[tuple[str, int], ...]
PhaseName = Literal["generate", "update", "sync"]
LEVELS: tuple[Recompute, ...] = ("none", "selective", "alternating", "full")


@dataclass(frozen=True, slots=True)
class Phase:
    """Content of device memory in one phase."""

    name: PhaseName
    parts: Parts
    """(what, bytes), engine's first; 0 for what sleeps meanwhile."""
    measured: int | None = None
    """Largest memory use measured in this phase so far, in bytes; None before the first."""
    apart: bool = False
    """Whether engine and trainer have devices of their own."""

    @property
    def total(self) -> int:
        """Bytes of all parts together; of the fuller device if there are two."""
        if self.apart:
            return max(self.of("engine"), self.of("trainer"))
        return sum(size for _, size in self.parts)

    def of(self, side: Literal["engine", "trainer"]) -> int:
        """Bytes that the engine, or the trainer, holds."""
        return sum(size for what, size in self.parts if what.startswith(side))

    @property
    def kept(self) -> int:
        """Bytes that the trainer holds between updates, where they are on the device."""
        return sum(size for what, size in self.parts if what in KEPT)


@dataclass(frozen=True, slots=True)
class MemoryPlan(Shown):
    """What is in device memory in each phase, and the settings that follow from it."""

    card: Card
    limit: int
    """Bytes that the session may take of the device."""
    phases: tuple[Phase, ...]
    kv_tokens: int
    """Tokens that the KV cache holds."""
    rollout_tokens: int
    """Tokens of an engine's share of a rollout whose responses are all as long as they may be."""
    sample_tokens: int
    """Tokens of such a sample, prompt and response."""
    max_tokens_per_gpu: int
    """Tokens of a micro-batch."""
    recompute: Recompute
    """What the backward pass recomputes; `model.gradient_checkpointing`."""
    compile: bool
    """Whether the trainer's layers are compiled."""
    optimizer_cpu_offload: bool
    kv_sleeps: bool
    """Whether the KV cache is released while the trainer works."""
    engine_weights_sleep: bool
    """Whether the engine's weights are in host memory while the trainer works."""
    trainer_sleeps: bool
    """Whether the trainer is in host memory while the engine generates."""

    @property
    def trainer_limit(self) -> int:
        """Bytes of a GPU that the trainer's process may take in an update, beside the engine."""
        beside = 0 if self.apart else self.phase("update").of("engine")
        return self.limit - beside - CONTEXT

    @property
    def apart(self) -> bool:
        """Whether engine and trainer have a device each."""
        return self.phases[0].apart

    @property
    def usable(self) -> int:
        """Bytes that the plan distributes; the rest is a reserve for fragmentation."""
        return int(self.limit * (1 - SPARE))

    @property
    def samples_at_once(self) -> int:
        """Samples of full length that fit into the KV cache."""
        return self.kv_tokens // self.sample_tokens

    def phase(self, name: PhaseName) -> Phase:
        """The phase of this name."""
        return next(phase for phase in self.phases if phase.name == name)

    def with_measured(self, measured: dict[str, int]) -> MemoryPlan:
        """Copy of the plan with measured bytes, by phase."""
        seen = (replace(phase, measured=measured.get(phase.name)) for phase in self.phases)
        return replace(self, phases=tuple(seen))


def make_plan(
    config: SessionConfig,
    shape: ModelShape,
    card: Card,
    *,
    max_response_len: int,
    context_length: int,
    width: int,
    adapters: AdapterShape | None = None,
    draft: ModelShape | None = None,
) -> MemoryPlan:
    """Plan the memory of one device.

    Args:
        config: the settings; those that are left open are chosen.
        shape: the model's sizes.
        card: the device.
        max_response_len: tokens.
        context_length: tokens of the longest sample that the engine takes.
        width: bytes of a number in the computation, 2 or 4.
        adapters: those beside which all weights are frozen; None trains all.
        draft: the model that drafts for the engine; None where none does.

    Raises:
        ConfigError: it cannot fit; names the setting to change.
    """
    given = config.memory.device_gib
    limit = int(given * GIB) if given else card.total
    limit = min(limit, card.total) if card.is_gpu else limit
    compiled = config.model.compile
    if compiled is None:
        compiled = card.is_gpu and shape.parameters >= COMPILED_FROM

    def fit(config: SessionConfig, response: int, limit: int) -> MemoryPlan:
        of_models = adapters, draft, context_length
        sizes = Sizes(shape, config, width, card.is_gpu, compiled, *of_models)
        longest = min(context_length, PROMPT_TOKENS + response)
        update = _fit_update(sizes, limit, longest)
        return _fit_engine(sizes, card, limit, longest, update)

    try:
        return fit(config, max_response_len, limit)
    except DoesNotFitError as error:
        out = ways_out(fit, config, max_response_len, limit, card.total)
        raise ConfigError(error.what, why=error.why, fix=out) from None


@dataclass(frozen=True, slots=True)
class _Update:
    """How the trainer computes so that its phase fits."""

    tokens: int
    level: Recompute
    offload: bool
    peak: int
    """Bytes of the trainer in an update, all together."""


def _ways(config: SessionConfig, longest: int, gpu: bool) -> Iterator[tuple[bool, Recompute, int]]:
    """Allowed ways to train, fastest first: (offload, recompute, micro-batch tokens)."""
    chosen = config.model.gradient_checkpointing
    levels: tuple[Recompute, ...] = LEVELS
    if chosen is not None:
        levels = (("full" if chosen else "none") if isinstance(chosen, bool) else chosen,)
    tokens = config.training.max_tokens_per_gpu
    sizes = [MICRO_BATCH, MICRO_BATCH // 2] if tokens is None else [tokens]
    small = [t for t in (4096, 2048, 1024) if t > longest] if tokens is None else []
    offload = config.training.optimizer_cpu_offload if gpu else False
    four_bit = config.model.lora is not None and config.model.lora.load_in_4bit
    if four_bit or config.training.optimizer == "adamw8bit":
        offload = False
    pairs = [(level, size) for level in levels for size in sizes]
    if config.model.lora:
        # Adapters are many small products, which take longer to launch than to compute: twice the
        # tokens at once are worth recomputing feed-forward parts.
        pairs.sort(key=lambda pair: (max(LEVELS.index(pair[0]), 1), -pair[1]))
    for off in (False, True) if offload is None else (offload,):
        yield from ((off, level, max(t, longest)) for level, t in pairs)
        yield from ((off, levels[-1], t) for t in [*small, longest] if tokens is None)


def _fit_update(sizes: Sizes, limit: int, longest: int) -> _Update:
    """Choose the fastest way to train that fits while the engine sleeps as deeply as it may."""
    context = CONTEXT if sizes.gpu else 0
    beside = sizes.engine_stays + sizes.engine_asleep
    if sizes.apart:
        beside = 0
    elif not sizes.sleeps:
        beside = sizes.engine_awake + sizes.least_tokens(longest) * sizes.token
    room = int(limit * (1 - SPARE)) - beside - context
    least: _Update | None = None
    for offload, level, tokens in _ways(sizes.config, longest, sizes.gpu):
        peak = sizes.resident(offload) + sum(sizes.update_peak(tokens, level, offload))
        if peak <= room:
            return _Update(tokens, level, offload, peak)
        tried = _Update(tokens, level, offload, peak)
        least = min(least or tried, tried, key=lambda u: (u.peak, u.tokens))
    assert least
    fixed = sizes.resident(least.offload) + sizes.working(least.offload)
    handed_in = sizes.gradients_handed_in(least.offload)
    rest = f"a micro-batch of {least.tokens:,} tokens {in_gib(least.peak - fixed)}"
    if least.peak - fixed <= handed_in:
        rest = f"gradients at the end of a backward pass {in_gib(handed_in)}"
    raise DoesNotFitError(
        f"The trainer does not fit: it needs {in_gib(least.peak)} and has {in_gib(max(room, 0))} "
        f"of the {in_gib(limit)} that the session may take.",
        f"{sizes.what_is_kept} take {in_gib(fixed)}, {rest}.",
    )


def _fit_engine(sizes: Sizes, card: Card, limit: int, longest: int, update: _Update) -> MemoryPlan:
    config, gpu, token = sizes.config, sizes.gpu, sizes.token
    usable = int(limit * (1 - SPARE))
    trainers = CONTEXT if gpu and not sizes.apart else 0
    stays = 0 if sizes.apart else sizes.not_given_back(update.offload)
    fixed = sizes.engine_awake + trainers + stays
    resident = 0 if sizes.apart else sizes.resident(update.offload)
    wanted = sizes.wanted_tokens(longest)
    forced = "never" if sizes.apart else config.memory.sleep
    room, alone = usable - fixed - resident, usable - fixed
    spare = usable - (CONTEXT if gpu else 0) - update.peak
    awake = sizes.engine_awake
    trainer_sleeps = gpu and forced == "always"
    if forced == "auto" and gpu and not update.offload:
        trainer_sleeps = room < min(wanted, longest) * token or 2 * room < wanted * token
    if not (sizes.sleeps or sizes.apart):
        room = min(room, spare - awake)
    tokens = max(min(wanted, (alone if trainer_sleeps else room) // token), 0)
    least = sizes.least_tokens(longest)
    if tokens < least:
        raise DoesNotFitError(
            f"The engine does not fit: beside its weights {in_gib(tokens * token)} are left for "
            f"the KV cache, and {least:,} tokens of it take {in_gib(least * token)}.",
            f"The session may take {in_gib(limit)}; the engine's weights are "
            f"{in_gib(sizes.engine_weights)}.",
        )
    kv = tokens * token
    crowded = sizes.sync(update.offload, kv) > usable
    kv_sleeps = sizes.sleeps and (forced == "always" or awake + kv > spare or crowded)
    needed = sizes.sync(update.offload, None if kv_sleeps else kv)
    if gpu and needed > usable:
        raise DoesNotFitError(
            f"A weight sync does not fit: trainer and engine hold their weights side by side, and "
            f"need {in_gib(needed)} of the {in_gib(usable)} that there are.",
            f"The engine's weights take {in_gib(sizes.engine_weights)}, what the trainer keeps "
            f"{in_gib(resident)}, buckets and sums {in_gib(sizes.buckets() + sizes.merging)}.",
        )
    kept_awake = sizes.engine_weights + sizes.engine_draft
    kept_awake += sizes.engine_stays + sizes.engine_asleep
    weights_sleep = kv_sleeps and (forced == "always" or kept_awake > spare)
    return MemoryPlan(
        card=card,
        limit=limit,
        phases=_phases(sizes, update, kv, kv_sleeps, weights_sleep, trainer_sleeps, usable),
        kv_tokens=tokens,
        rollout_tokens=sizes.rollout_tokens(longest),
        sample_tokens=longest,
        max_tokens_per_gpu=config.training.max_tokens_per_gpu or update.tokens,
        recompute=update.level,
        compile=sizes.compiled,
        optimizer_cpu_offload=update.offload,
        kv_sleeps=kv_sleeps,
        engine_weights_sleep=weights_sleep,
        trainer_sleeps=trainer_sleeps,
    )


def _phases(
    sizes: Sizes,
    update: _Update,
    kv: int,
    kv_sleeps: bool,
    weights_sleep: bool,
    trainer_sleeps: bool,
    usable: int,
) -> tuple[Phase, ...]:
    gpu, weights, draft = sizes.gpu, sizes.engine_weights, sizes.engine_draft
    graphs = sizes.engine_graphs
    resident = sizes.kept(update.offload)
    working, rest = sizes.update_peak(update.tokens, update.level, update.offload)
    # Memory that the update took is given back only where the engine needs the room.
    kept = working + rest if gpu else 0
    stays = sizes.not_given_back(update.offload) if kv_sleeps else kept
    asleep = sizes.engine_asleep if kv_sleeps else graphs
    held, held_draft = (0, 0) if weights_sleep else (weights, draft)
    buckets = sizes.buckets() if gpu else weights
    if sizes.sends_adapters and not weights_sleep:  # then a sync sends them alone
        buckets = sizes.width * sizes.trained
    # The buckets are taken from what is kept where the rest of the device is taken.
    left = max(usable - sizes.sync(update.offload, None if kv_sleeps else kv), 0)
    kv_kept = 0 if kv_sleeps else kv
    return (
        _phase(
            sizes,
            "generate",
            (weights, draft, kv, graphs),
            _asleep(resident) if trainer_sleeps else resident,
            ("trainer: kept for the next update", stays),
        ),
        _phase(
            sizes,
            "update",
            (held, held_draft, kv_kept, asleep),
            resident,
            ("trainer: gradients, weights to compute with", working),
            ("trainer: activations, logits", rest),
        ),
        _phase(
            sizes,
            "sync",
            (weights, draft, kv_kept, asleep),
            resident,
            ("trainer: kept for the next update", stays if weights_sleep else min(kept, left)),
            ("trainer: buckets of weights", buckets),
            *((("trainer: a weight and its adapter", sizes.merging),) if sizes.adapters else ()),
        ),
    )


def _asleep(parts: Parts) -> Parts:
    return tuple((name, 0) for name, _ in parts)


def _phase(
    sizes: Sizes,
    name: PhaseName,
    engine: tuple[int, int, int, int],
    trainer: Parts,
    *rest: tuple[str, int],
) -> Phase:
    weights, draft, cache, workspace = engine
    beside: Parts = ()
    if sizes.sends_adapters:
        beside += (("engine: adapters", sizes.engine_adapters),)
    if sizes.draft:
        beside += (("engine: draft", draft),)
    parts = (
        ("engine: process", sizes.engine_context),
        ("engine: weights", weights),
        *beside,
        ("engine: KV cache", cache),
        ("engine: graphs, workspace", workspace),
        ("trainer: process", CONTEXT if sizes.gpu else 0),
    )
    return Phase(name, (*parts, *trainer, *rest), apart=sizes.apart)


class DoesNotFitError(Exception):
    """No plan fits. Becomes a ConfigError once the ways out are known.

    Args:
        what: what does not fit, with numbers.
        why: what takes the memory.
    """

    def __init__(self, what: str, why: str) -> None:
        super().__init__(what)
        self.what, self.why = what, why


Fit = Callable[[SessionConfig, int, int], object]
"""(settings, tokens of a response, bytes that may be taken) -> a plan; raises DoesNotFitError."""


def ways_out(fit: Fit, config: SessionConfig, response: int, limit: int, total: int) -> str:
    """Name settings each of which alone makes the plan fit, or else a set that does together.

    Args:
        fit: makes a plan, or raises DoesNotFitError.
        config: the settings that do not fit.
        response: tokens of the longest response.
        limit: bytes that the session may take.
        total: bytes of the device.
    """

    def fits(changed: SessionConfig, response: int, limit: int = limit) -> bool:
        try:
            fit(changed, response, limit)
        except DoesNotFitError:
            return False
        return True

    loosened = list(_loosened(config))
    found = [words for words, changed in loosened if fits(changed, response)]
    if tokens := _most(lambda length: fits(config, length), response):
        found.append(f"set rollout.max_response_len: {tokens}")
    cache = config.engine.max_total_tokens or 0
    if tokens := _most(
        lambda n: fits(_with(config, "engine.max_total_tokens", n), response), cache
    ):
        found.append(f"set engine.max_total_tokens: {tokens}")
    sizes = range(-(-limit // GIB), total // GIB + 1)
    place = bisect_left(sizes, True, key=lambda size: fits(config, response, size * GIB))
    if config.memory.device_gib and place < len(sizes):
        found.append(f"set memory.device_gib: {sizes[place]}")
    if not found and (together := _together(fits, config, response)):
        found.append(together)
    return ", or ".join([*found, "take a smaller model (model.name) or a larger device"]) + "."


def _together(fits: Callable[[SessionConfig, int], bool], config: SessionConfig, most: int) -> str:
    """Relax all settings together, with the longest response that then fits; "" if none does."""
    done = []
    while step := next(_loosened(config), None):
        done.append(step[0])
        config = step[1]
    tokens = _most(lambda length: fits(config, length), most + 1)
    if tokens and tokens < most:
        done.append(f"set rollout.max_response_len: {tokens}")
    return ", and ".join(done) if tokens else ""


def _loosened(config: SessionConfig) -> Iterator[tuple[str, SessionConfig]]:
    """Settings that cost memory, one by one, and the configuration without each."""
    training, recompute = config.training, config.model.gradient_checkpointing
    eight_bit = training.optimizer == "adamw8bit"
    stays = training.optimizer_cpu_offload is False and not eight_bit
    no_reference = "0 (no reference model)"
    for costs, key, value, words in (
        (config.memory.sleep == "never", "memory.sleep", "auto", "auto"),
        (training.max_tokens_per_gpu is not None, "training.max_tokens_per_gpu", None, ""),
        (recompute not in (None, True), "model.gradient_checkpointing", True, "true"),
        (stays, "training.optimizer_cpu_offload", True, "true"),
        (eight_bit, "training.optimizer", "adamw", "adamw (which may step in host memory)"),
        (training.kl_loss_coef > 0, "training.kl_loss_coef", 0.0, no_reference),
        (training.kl_coef > 0, "training.kl_coef", 0.0, no_reference),
    ):
        if costs:
            what = f"leave {key} open" if value is None else f"set {key}: {words}"
            yield what, _with(config, key, value)
    lora = config.model.lora
    if lora and not lora.load_in_4bit:
        in_4_bits = lora.model_copy(update={"load_in_4bit": True})
        yield "set model.lora.load_in_4bit: true", _with(config, "model.lora", in_4_bits)


def _with(config: SessionConfig, key: str, value: Any) -> SessionConfig:
    """A changed copy, not validated; it is only planned for."""
    section, name = key.split(".")
    changed = getattr(config, section).model_copy(update={name: value})
    return config.model_copy(update={section: changed})


def _most(fits: Callable[[int], bool], below: int) -> int:
    """The largest number under `below` that fits, in round steps of 64; 0 where none does."""
    most = bisect_left(range(1, below), True, key=lambda n: not fits(n))
    return most // 64 * 64 or most


def memory_plan(
    config: SessionConfig | str | Path = "tiny", *, device_gib: float | None = None
) -> MemoryPlan:
    """Plan the memory of a session with these settings; starts nothing and needs no GPU.

        kit.memory_plan("config.yaml", device_gib=24)

    Args:
        config: as for `RLSession.start`.
        device_gib: plan for a GPU of so many GiB; None takes this machine's device.

    Raises:
        ConfigError: it cannot fit, or a setting is wrong.
        ModelError, DataError: the model or the prompts are missing.
    """
    from kit.data import load_prompts
    from kit.memory.sizes import response_limit
    from kit.utils.hardware import pick_device

    config = SessionConfig.of(config)
    if device_gib is not None and not device_gib > 0:
        raise ConfigError(
            f"device_gib is {device_gib!r}.", fix="give the GiB of the card, such as 24."
        )
    model = find(config.model)
    train = load_prompts(config.data, split="train", model_name=config.model.name, seed=config.seed)
    response = response_limit(config, train, model)
    if device_gib is None:
        return plan_for(config, model, pick_device(config.device), response)
    card = Card(f"a card of {device_gib:g} GiB", int(device_gib * GIB), is_gpu=True)
    return plan_for(config, model, "cuda", response, card)


def plan_for(
    config: SessionConfig,
    model: ModelSource,
    device: str,
    max_response_len: int,
    card: Card | None = None,
) -> MemoryPlan:
    """Plan for this machine's device, or for another card.

    Args:
        config: the settings; those that are left open are chosen.
        model: where the model is.
        device: `cpu` or `cuda`.
        max_response_len: tokens.
        card: None takes the one that is here.

    Raises:
        ConfigError: it cannot fit, and which settings would make it; or an adapter fits nothing.
        ModelError: the directory does not tell the model's sizes.
    """
    if card is None and device == "cuda" and config.cluster.address and not Card.gpu():
        if config.memory.device_gib is None:
            raise ConfigError(
                "The session's GPUs are on other nodes of the cluster, and their size is unknown.",
                fix="set memory.device_gib to what the session may take of each, such as 70.",
            )
        size = int(config.memory.device_gib * GIB)
        card = Card("a GPU of the cluster", size, is_gpu=True)
    if card is None:
        card = (Card.gpu() if device == "cuda" else None) or Card.host()
    widths = {"float32": 4, "bfloat16": 2, "auto": 2 if card.is_gpu else 4}
    return make_plan(
        config,
        ModelShape.read(model.path),
        card,
        max_response_len=max_response_len,
        context_length=model.context_length,
        width=widths[config.model.dtype],
        adapters=AdapterShape.of(config.model, model) if config.model.lora else None,
        draft=_draft_shape(config, model),
    )


def _draft_shape(config: SessionConfig, model: ModelSource) -> ModelShape | None:
    """Sizes of what drafts; None where nothing with weights does."""
    drafts = config.engine.speculative
    if drafts is None or not drafts.has_weights:
        return None
    if drafts.algorithm == "mtp":
        return ModelShape.read(model.path, of_mtp=True)
    found = find(config.model.model_copy(update={"name": drafts.draft_model, "lora": None}))
    return ModelShape.read(found.path)
