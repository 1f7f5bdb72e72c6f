"""`MemoryPlan`: what each phase of an iteration holds, decided before anything starts.

Three phases share one device:

    generate   engine: weights, KV cache, graphs       trainer: weights, optimizer, or asleep
    update     trainer: all of it, activations         engine: KV cache and weights, or asleep
    sync       trainer's weights, buckets, engine's weights; the KV cache as in update

The plan takes what costs least time: nothing sleeps where everything fits; then the engine's KV
cache is let go during updates, then its weights; smaller micro-batches and recomputation come
next; the trainer moves to host memory while the engine generates where the KV cache would
otherwise hold less than half of a rollout. All sizes are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kit.config import SessionConfig
from kit.errors import ConfigError
from kit.memory.card import Card
from kit.memory.shape import ModelShape
from kit.reports import Shown

GIB = 1 << 30
PROMPT_TOKENS = 512
"""Allowed for a prompt, whose length is not known before the data is tokenised."""
MICRO_BATCH = 16384
"""Tokens a micro-batch where the setting is left open and there is room."""
CONTEXT = int(0.55 * GIB)
"""What the driver and the libraries of one process hold on a GPU."""
GRAPHS = int(1.2 * GIB)
"""SGLang's captured graphs, its workspaces and the logits of a decode step."""
ASLEEP = int(0.4 * GIB)
"""What is left of those while it sleeps."""
SPARE = 0.04
"""Share of the device that is left to fragments."""
LOGIT_PIECES = 3 * GIB // 2
"""Logits, their gradient and their workspace: see `kit.model.log_probs`."""
COMPILED_FROM = 100_000_000
"""Parameters from which compiling the layers pays for the half minute that it takes once."""

Recompute = Literal["none", "selective", "full"]
PhaseName = Literal["generate", "update", "sync"]
LEVELS: tuple[Recompute, ...] = ("none", "selective", "full")


@dataclass(frozen=True, slots=True)
class Phase:
    """What is on the device in one phase."""

    name: PhaseName
    parts: tuple[tuple[str, int], ...]
    """(what, bytes), engine's first; 0 for what sleeps meanwhile."""
    measured: int | None = None
    """Most that was seen on the device in this phase so far; None before."""

    @property
    def total(self) -> int:
        """Bytes, all parts together."""
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, slots=True)
class MemoryPlan(Shown):
    """What holds the device when, and the settings that follow from it."""

    card: Card
    limit: int
    """Bytes that the session may take of the device."""
    phases: tuple[Phase, ...]
    kv_tokens: int
    """Tokens that the KV cache holds."""
    rollout_tokens: int
    """Tokens of a rollout whose responses are all as long as they may be."""
    max_tokens_per_gpu: int
    """Tokens of a micro-batch."""
    recompute: Recompute
    """What the backward pass makes again; `model.gradient_checkpointing`."""
    compile: bool
    """Are the trainer's layers compiled?"""
    optimizer_cpu_offload: bool
    kv_sleeps: bool
    """Is the KV cache let go while the trainer works?"""
    engine_weights_sleep: bool
    """Do the engine's weights wait in host memory while the trainer works?"""
    trainer_sleeps: bool
    """Does the trainer wait in host memory while the engine generates?"""

    @property
    def trainer_limit(self) -> int:
        """Bytes that the trainer's process may take: what its phase leaves it."""
        update = next(phase for phase in self.phases if phase.name == "update")
        engine = sum(size for what, size in update.parts if what.startswith("engine"))
        return self.limit - engine - CONTEXT

    def with_measured(self, measured: dict[str, int]) -> MemoryPlan:
        """The same beside what was seen, in bytes by phase."""
        seen = (replace(phase, measured=measured.get(phase.name)) for phase in self.phases)
        return replace(self, phases=tuple(seen))


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of everything, for one model, one device and one configuration."""

    shape: ModelShape
    config: SessionConfig
    width: int
    """Bytes of a number in the computation."""
    gpu: bool
    compiled: bool

    @property
    def engine_weights(self) -> int:
        return self.shape.parameters * self.width

    @property
    def models(self) -> int:
        """Models that the trainer holds beside the policy."""
        training = self.config.training
        return int(training.has_reference) + int(training.advantage_estimator == "ppo")

    def resident(self, offload: bool) -> int:
        """Trainer between updates: float32 weights, two moments, further models; a share each."""
        if offload:
            return 0
        training, p = self.config.training, 4 * self.shape.parameters
        critic = training.advantage_estimator == "ppo"
        own = 3 * p + int(training.has_reference) * p + int(critic) * 3 * p
        return own // (1 if self.gpu else training.num_trainers)

    def working(self, offload: bool) -> int:
        """Trainer in an update, beside activations: gradients and weights in their width."""
        p = self.shape.parameters
        return (0 if offload else 4 * p) + self.width * p

    def gradients_handed_in(self) -> int:
        """At the end of a backward pass: gradients as computed, and in float32, twice."""
        return (self.width + 4 + 4) * self.shape.parameters

    def activations(self, tokens: int, level: Recompute) -> int:
        """Kept for the backward pass, and what one layer needs on top."""
        s, width = self.shape, self.width
        queries, keys = s.heads * s.head_size, s.key_value_heads * s.head_size
        attention = 2 * s.hidden + 2 * queries + 2 * keys
        kept = {"none": attention + 2 * s.intermediate, "selective": attention, "full": s.hidden}
        layer = attention + 5 * s.intermediate
        eager = 1.0 if self.compiled else 2.3
        return int(eager * tokens * width * (s.layers * kept[level] + layer))

    def logits(self, tokens: int) -> int:
        """Pieces of logits and the output embedding's gradient; all logits of a small model."""
        s = self.shape
        in_pieces = LOGIT_PIECES + s.vocabulary * s.hidden * (4 + 2 * self.width)
        return min(in_pieces, 5 * 4 * tokens * s.vocabulary)

    def update_peak(self, tokens: int, level: Recompute, offload: bool) -> tuple[int, int]:
        """(working memory, activations or what takes their place at the end)."""
        forward = self.activations(tokens, level) + self.logits(tokens)
        # One layer after the other turns from activations into gradients.
        return self.working(offload), max(forward, self.gradients_handed_in())

    def buckets(self) -> int:
        """Two buffers that weights travel in."""
        return min(2 * self.config.engine.update_weight_buffer_size, self.engine_weights)


def make_plan(
    config: SessionConfig,
    shape: ModelShape,
    card: Card,
    *,
    max_response_len: int,
    context_length: int,
    width: int,
) -> MemoryPlan:
    """Work out who holds what.

    Args:
        config: the settings; those that are left open are chosen.
        shape: the model's sizes.
        card: the device.
        max_response_len: tokens.
        context_length: tokens of the longest sample that the engine takes.
        width: bytes of a number in the computation, 2 or 4.

    Raises:
        ConfigError: it cannot fit; names the setting to change.
    """
    given = config.memory.device_gib
    limit = min(card.total, int(given * GIB)) if given else card.total
    if not card.is_gpu:
        limit = int(given * GIB) if given else card.total
    compiled = config.model.compile
    if compiled is None:
        compiled = card.is_gpu and shape.parameters >= COMPILED_FROM
    sizes = _Sizes(shape, config, width, card.is_gpu, compiled)
    longest = min(context_length, PROMPT_TOKENS + max_response_len)
    update = _fit_update(sizes, limit, longest)
    return _fit_engine(sizes, card, limit, longest, update)


@dataclass(frozen=True, slots=True)
class _Update:
    """How the trainer computes, so that its phase fits."""

    tokens: int
    level: Recompute
    offload: bool
    peak: int
    """Bytes of the trainer in an update, all together."""


def _ways(config: SessionConfig, longest: int) -> Iterator[tuple[bool, Recompute, int]]:
    """(offload, recompute, micro-batch tokens) that the settings allow, fastest first."""
    chosen = config.model.gradient_checkpointing
    names: dict[object, Recompute] = {False: "none", True: "full", "selective": "selective"}
    levels = LEVELS if chosen is None else (names[chosen],)
    tokens = config.training.max_tokens_per_gpu
    sizes = [MICRO_BATCH, MICRO_BATCH // 2] if tokens is None else [tokens]
    small = [t for t in (4096, 2048, 1024) if t > longest] if tokens is None else []
    offload = config.training.optimizer_cpu_offload
    for off in (False, True) if offload is None else (offload,):
        yield from ((off, level, max(t, longest)) for level in levels for t in sizes)
        yield from ((off, levels[-1], t) for t in [*small, longest] if tokens is None)


def _fit_update(sizes: _Sizes, limit: int, longest: int) -> _Update:
    """The fastest way to train that fits while the engine sleeps as deeply as it can."""
    asleep = (CONTEXT + ASLEEP) if sizes.gpu else sizes.engine_weights
    context = CONTEXT if sizes.gpu else 0
    room = int(limit * (1 - SPARE)) - asleep - context
    least: _Update | None = None
    for offload, level, tokens in _ways(sizes.config, longest):
        peak = sizes.resident(offload) + sum(sizes.update_peak(tokens, level, offload))
        least = min(
            (u for u in (least, _Update(tokens, level, offload, peak)) if u), key=lambda u: u.peak
        )
        if peak <= room:
            return _Update(tokens, level, offload, peak)
    assert least
    raise ConfigError(
        f"The trainer does not fit: it needs {_gib(least.peak)} and has {_gib(max(room, 0))} of "
        f"the {_gib(limit)} that the session may take.",
        why=f"Weights, gradients and optimizer of {sizes.shape.parameters / 1e6:,.0f} M parameters "
        f"take {_gib(sizes.resident(least.offload) + sizes.working(least.offload))}, a micro-batch "
        f"of {least.tokens:,} tokens the rest.",
        fix=_trainer_fix(sizes, least),
    )


def _trainer_fix(sizes: _Sizes, least: _Update) -> str:
    config, fixes = sizes.config, []
    if config.training.max_tokens_per_gpu is not None:
        fixes.append("lower training.max_tokens_per_gpu or leave it open")
    if config.model.gradient_checkpointing not in (None, True):
        fixes.append("set model.gradient_checkpointing: true")
    if not least.offload:
        fixes.append("set training.optimizer_cpu_offload: true")
    if config.training.max_tokens_per_gpu is None:
        fixes.append("lower rollout.max_response_len: a micro-batch holds at least one sample")
    if config.memory.device_gib:
        fixes.append("raise memory.device_gib")
    if sizes.models:
        fixes.append("set training.kl_loss_coef: 0 (no reference model)")
    return ", or ".join([*fixes, "take a smaller model"]) + "."


def _fit_engine(sizes: _Sizes, card: Card, limit: int, longest: int, update: _Update) -> MemoryPlan:
    config, gpu = sizes.config, sizes.gpu
    usable = int(limit * (1 - SPARE))
    fixed = sizes.engine_weights + (2 * CONTEXT + GRAPHS if gpu else 0)
    resident = sizes.resident(update.offload)
    token = sizes.shape.key_value_bytes(sizes.width)
    wanted = config.samples_at_once * longest
    if config.engine.max_total_tokens:
        wanted = config.engine.max_total_tokens
    forced = config.memory.sleep
    room, alone = usable - fixed - resident, usable - fixed
    trainer_sleeps = forced == "always"
    if forced == "auto" and gpu and not update.offload:
        trainer_sleeps = room < min(wanted, longest) * token or 2 * room < wanted * token
    tokens = min(wanted, (alone if trainer_sleeps else room) // token)
    if not gpu:
        tokens = wanted
    least = min(longest, wanted)
    if tokens < least or (config.engine.max_total_tokens and tokens < wanted):
        _refuse_engine(sizes, limit, wanted if config.engine.max_total_tokens else least, tokens)
    kv = tokens * token
    awake = sizes.engine_weights + (CONTEXT + GRAPHS if gpu else 0)
    spare = usable - (CONTEXT if gpu else 0) - update.peak
    kv_sleeps = gpu and (forced == "always" or (forced == "auto" and awake + kv > spare))
    weights_sleep = gpu and (forced == "always" or (kv_sleeps and awake > spare))
    if not kv_sleeps and gpu and awake + kv > spare:
        raise ConfigError(
            f"With memory.sleep: never, engine and trainer need {_gib(awake + kv + update.peak)} "
            f"together, and the session may take {_gib(limit)}.",
            fix="set memory.sleep: auto, or lower engine.max_total_tokens "
            f"({tokens:,} tokens of KV cache are {_gib(kv)}).",
        )
    return MemoryPlan(
        card=card,
        limit=limit,
        phases=_phases(sizes, update, kv, kv_sleeps, weights_sleep, trainer_sleeps),
        kv_tokens=tokens,
        rollout_tokens=wanted,
        max_tokens_per_gpu=update.tokens,
        recompute=update.level,
        compile=sizes.compiled,
        optimizer_cpu_offload=update.offload,
        kv_sleeps=kv_sleeps,
        engine_weights_sleep=weights_sleep,
        trainer_sleeps=trainer_sleeps,
    )


def _refuse_engine(sizes: _Sizes, limit: int, least: int, tokens: int) -> None:
    token = sizes.shape.key_value_bytes(sizes.width)
    raise ConfigError(
        f"The engine does not fit: beside its weights {_gib(max(tokens, 0) * token)} are left for "
        f"the KV cache, and {least:,} tokens of it take {_gib(least * token)}.",
        why=f"The session may take {_gib(limit)}; the engine's weights are "
        f"{_gib(sizes.engine_weights)}.",
        fix="lower engine.max_total_tokens, rollout.max_response_len or model.context_length, set "
        "memory.sleep: always, or take a smaller model.",
    )


def _phases(
    sizes: _Sizes,
    update: _Update,
    kv: int,
    kv_sleeps: bool,
    weights_sleep: bool,
    trainer_sleeps: bool,
) -> tuple[Phase, ...]:
    gpu, weights = sizes.gpu, sizes.engine_weights
    context = CONTEXT if gpu else 0
    graphs = GRAPHS if gpu else 0
    resident = sizes.resident(update.offload)
    working, rest = sizes.update_peak(update.tokens, update.level, update.offload)
    asleep = ASLEEP if kv_sleeps else graphs
    engine = ("engine: process", context)
    trainer = ("trainer: process", context)
    held = 0 if weights_sleep else weights
    return (
        Phase(
            "generate",
            (
                engine,
                ("engine: weights", weights),
                ("engine: KV cache", kv),
                ("engine: graphs, workspace", graphs),
                trainer,
                ("trainer: weights, optimizer", 0 if trainer_sleeps else resident),
            ),
        ),
        Phase(
            "update",
            (
                engine,
                ("engine: weights", held),
                ("engine: KV cache", 0 if kv_sleeps else kv),
                ("engine: graphs, workspace", asleep),
                trainer,
                ("trainer: weights, optimizer", resident),
                ("trainer: gradients, weights to compute with", working),
                ("trainer: activations, logits", rest),
            ),
        ),
        Phase(
            "sync",
            (
                engine,
                ("engine: weights", weights),
                ("engine: KV cache", 0 if kv_sleeps else kv),
                ("engine: graphs, workspace", asleep),
                trainer,
                ("trainer: weights, optimizer", resident),
                ("trainer: buckets of weights", sizes.buckets() if gpu else weights),
            ),
        ),
    )


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
