"""Forks: further sessions on the stack of one that trains adapters.

    parent ──────► steps ──► steps          one engine, one copy of the frozen weights
      └── fork ──► steps ──► steps          adapter, optimizer, data, reward, history of its own

A fork goes on from where its parent is, or, `fresh`, begins as a session of its own would. From
there on neither knows of the other, but that they take turns.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kit.checkpoint.inputs import WORDS, Inputs
from kit.checkpoint.state import TrainState
from kit.config import SessionConfig
from kit.config.changes import CHANGEABLE, with_changes
from kit.data.buffer import RolloutBuffer
from kit.data.stream import PromptStream
from kit.errors import ConfigError, SessionError, did_you_mean
from kit.lifecycle import configure, journal
from kit.lifecycle.checks import check_functions
from kit.lifecycle.start import SessionParts
from kit.rewards import build
from kit.rollout.collector import RolloutCollector
from kit.rollout.sampler import PromptSampler
from kit.samples import Rollout
from kit.utils.formatting import data_size
from kit.utils.hardware import free_memory
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.stack.slots import Slot
    from kit.stack.stack import Stack

NAME = re.compile(r"[A-Za-z0-9][\w+=-]{0,39}")
SPARE = 0.1
"""Share of the free host memory that a fork leaves."""
PASSED = {"reward": "reward=", "data": "data= or eval_data="}
"""Sections of which a fork has its own by an argument."""


def fork(
    parent: SessionParts,
    name: str,
    changes: Mapping[str, Any],
    seed: int | None,
    fresh: bool,
    inputs: Mapping[str, Any],
) -> SessionParts:
    """Start a fork of a session whose turn it is; returns its parts.

    Args:
        parent: of the session that it is a fork of.
        name: of the fork, among those of its stack.
        changes: settings that are to be others than the parent's.
        seed: another one than the parent's; None takes that.
        fresh: begin as a session of its own would.
        inputs: data and functions by argument of `RLSession.start`; None takes the parent's.

    Raises:
        SessionError: the parent trains all weights, or the name cannot be.
        ConfigError, DataError, RewardError: what the message names is wrong; nothing has changed.
    """
    before = parent.state.config
    _refuse(parent, name, before)
    config = _settings(before, f"{parent.root.state.config.name}.{name}", changes, seed)
    parts, slot = _assemble(parent, name, config, inputs, from_start=fresh)
    stack = parent.stack
    _check_room(stack, name)
    with held():
        stack.open(slot, fresh=fresh)
        parts.run_fork(parent.root, stack, slot)
        with parts.turn():
            if not fresh:
                configure.log(parts.state, parts.tracker.recorder, before)
            parts.note()
    return parts


def generate_together(members: Sequence[SessionParts], **given: Any) -> list[Rollout]:
    """Generate for several sessions of a stack; at once, where the engine has their adapters.

    Args:
        members: the sessions' parts.
        given: arguments of `RolloutCollector.generate`, the same for all.

    Raises:
        SessionError: they do not share a stack.
    """
    if not members or len({id(each) for each in members}) < len(members):
        what = "A session is named twice." if members else "No session is named."
        raise SessionError(what, fix="name each once: generate_together([session, fork]).")
    if len({id(each.running().root) for each in members}) > 1:
        names = ", ".join(each.state.config.name for each in members)
        raise SessionError(
            f"These sessions do not share a stack: {names}.",
            why="One engine writes for a session and its forks, and knows no others.",
            fix="name a session and its forks: generate_together([session, session.forks['b']]).",
        )
    with ExitStack() as taken:
        for each in sorted(members, key=lambda one: one.fork_name):  # in one order: none waits
            taken.enter_context(each.lock.take("generate_together"))  # for the other for ever
        try:
            return _together(members, given)
        finally:
            with held():
                for each in members:
                    with each.turn():
                        each.note()


def _together(members: Sequence[SessionParts], given: Mapping[str, Any]) -> list[Rollout]:
    stack, asked = members[0].stack, any(value is not None for value in given.values())
    plain = asked or not any(m.state.config.rollout.over_sampling_batch_size for m in members)
    rollouts: list[Rollout] = []
    if not (stack.writes_together and plain and len(members) > 1):
        for each in members:
            with each.turn():
                rollouts.append(each.collector.generate(**given))
        return rollouts
    slots = [each.slot for each in members if each.slot]
    with members[0].turn(), stack.together(slots), ExitStack() as undo:
        streams = []
        for each in members:
            undo.enter_context(each.collector.undo_draw_on_interrupt())
            with each.turn():
                streams.append(each.collector.begin(**given))
        try:
            for each, stream in zip(members, streams, strict=True):
                with each.turn():
                    rollouts.append(each.collector.finish(stream))
        except BaseException:
            rest = [*zip(members, streams, strict=True)][len(rollouts) + 1 :]
            with held():  # the engine was told to stop; what it has written stays
                for each, stream in rest:
                    stream.rest()
                    each.state.last_rollout = stream.rollout() or each.state.last_rollout
            raise
    return rollouts


def wanted(
    folder: Path,
    name: str,
    start: Mapping[str, Any],
    given: Mapping[str, Any],
    of_forks: Mapping[str, Mapping[str, Any] | None],
) -> dict[str, dict[str, Any]]:
    """Forks of a session to be found again, with the data and functions that are their own.

    Args:
        folder: of the session's stack.
        name: of the session.
        start: what its journal says of its start.
        given: data and functions of the session itself, by argument.
        of_forks: those passed for forks, by name; None for a fork that is given up.

    Raises:
        SessionError: there is no such fork, or something has to be passed again.
    """
    root = Inputs.of_state(start).described
    known = journal.forks(folder)
    for fork, passed in of_forks.items():
        if fork not in known:
            raise SessionError(f"{name!r} has no fork {fork!r}.", fix=did_you_mean(fork, known))
        if unknown := [argument for argument in passed or () if argument not in WORDS]:
            raise SessionError(
                f"A fork takes no {unknown[0]!r}.", fix=did_you_mean(unknown[0], WORDS)
            )
    found = {}
    for fork in known:
        own = of_forks.get(fork, {})
        if own is None:
            continue
        described = Inputs.of_state(journal.started_with(journal.of_fork(folder, fork)))
        same = {n: given.get(n) for n, told in described.described.items() if root.get(n) == told}
        all_of_it = described.again(
            dict.fromkeys(WORDS) | same | dict(own),
            SessionError,
            f"The fork {fork!r}",
            f"RLSession.attach({name!r}, forks={{{fork!r}: dict(...)}})",
        )
        # What is the session's own as well is there already.
        found[fork] = all_of_it | {n: None for n in same if n not in own}
    return found


def found(
    root: SessionParts, stack: Stack, folder: Path, inputs: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[SessionParts, Slot]]:
    """Make the parts of forks whose weights the trainers hold, and forget all others.

    Args:
        root: of the session, which runs again.
        stack: it has.
        folder: of the stack.
        inputs: what `wanted` gave.
    """
    for name in stack.slots.found - inputs.keys():
        stack.trainers.drop(name)
        journal.forget_fork(folder, name)
    for name, own in inputs.items():
        notes = journal.of_fork(folder, name)
        if name not in stack.slots.found:
            warnings.warn(
                f"The fork {name!r} is gone: no trainer holds its weights. Continue from its last "
                "checkpoint: RLSession.load(path), or session.fork(...).restore(path).",
                stacklevel=5,
            )
            journal.forget_fork(folder, name)
            continue
        config = SessionConfig(**journal.settings(notes, journal.noted(notes)["now"]))
        parts, slot = _assemble(root, name, config, own, from_start=True)
        parts.state.inputs = Inputs.of_state(journal.started_with(notes))
        yield parts, slot


def _assemble(
    parent: SessionParts,
    name: str,
    config: SessionConfig,
    inputs: Mapping[str, Any],
    *,
    from_start: bool,
) -> tuple[SessionParts, Slot]:
    """Make a fork's parts and its share of the stack; nothing of it runs yet.

    Args:
        parent: of the session that it takes after.
        name: of the fork.
        config: its settings.
        inputs: data and functions of its own.
        from_start: at the first step, not where its parent is.

    Raises:
        ConfigError, DataError, RewardError: what the message names is wrong.
    """
    from kit.rewards.signature import check_reward
    from kit.stack.slots import Slot

    stack = parent.stack
    data, eval_data, own_reward, advantage, loss = (inputs[each] for each in WORDS)
    advantage, loss = advantage or parent.advantage, loss or stack.settings.loss
    check_functions(config.training, advantage, loss)
    sampler = parent.sampler.for_fork(config, data, eval_data)
    longest = stack.slots.first.max_response_len
    if sampler.max_response_len > longest:
        raise ConfigError(
            f"Responses to this data may have {sampler.max_response_len:,} tokens, and those of "
            f"{parent.root.state.config.name!r} have {longest:,} at most: memory and context are "
            "planned for that.",
            fix="start that session with a larger rollout.max_response_len.",
        )
    reward = parent.reward
    if own_reward is not None:
        reward = own_reward
    elif data is not None and "reward" not in parent.state.inputs.described:
        reward = build(config.reward, sampler.train.default_reward)
    check_reward(reward)
    new_data = data is not None
    state = _state(parent.state, config, sampler, new_data=new_data, from_start=from_start)
    described = Inputs.of(**inputs).described
    state.inputs = Inputs({**parent.state.inputs.described, **described})
    parts = SessionParts(config, state)
    parts.sampler, parts.reward, parts.advantage = sampler, reward, advantage
    parts.collector = RolloutCollector(state, sampler, stack)
    return parts, Slot(name, config, sampler.max_response_len, loss)


def _refuse(parent: SessionParts, name: object, config: SessionConfig) -> None:
    """Raise SessionError for a session that has no adapters, or a name that cannot be."""
    if config.model.lora is None:
        raise SessionError(
            f"The session {config.name!r} trains all weights, and only adapters can be forked.",
            why="Forks share the frozen weights of the model. Without any, each would be a whole "
            "model with an optimizer of its own.",
            fix="start one with adapters (the preset tiny-lora, or model.lora: {r: 16}). To try "
            "another update of this one, and go back: session.what_if(...), session.snapshot().",
        )
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SessionError(
            f"{name!r} cannot be the name of a fork.",
            fix="give letters, digits and _ + = -, 40 at most: session.fork('higher-rate').",
        )
    if name in parent.forks:
        raise SessionError(
            f"There is a fork {name!r} already.",
            fix=f"it is session.forks[{name!r}]; choose another name, or close it first.",
        )


def _settings(
    before: SessionConfig, name: str, changes: Mapping[str, Any], seed: int | None
) -> SessionConfig:
    """The fork's settings. Raises ConfigError for one that all on a stack have in common."""
    for each in changes:
        section = str(each).partition(".")[0]
        if section in PASSED and each not in CHANGEABLE:
            raise ConfigError(
                f"{each} is not a setting that a fork can be given.",
                fix=f"pass the fork's own by {PASSED[section]}, as RLSession.start takes it.",
            )
    try:
        config = with_changes(before, changes) if changes else before
    except ConfigError as error:
        if "cannot change while the session runs" not in error.what:
            raise
        raise ConfigError(
            f"{error.what.split()[0]} is the same for all forks of a stack.",
            why="They share its processes, its model and its memory, which were made with it. What "
            "session.configure may change, a fork may have otherwise.",
            fix="start a session of its own with it.",
        ) from None
    if seed is not None and seed != before.seed and before.engine.weight_noise:
        raise ConfigError(
            "A fork has its parent's seed where engine.weight_noise is set.",
            why="The noise is drawn by the seed of the session that the stack was started for.",
            fix="leave seed out, or start a session of its own.",
        )
    config = config.replace("name", name)
    return config if seed is None else config.replace("seed", seed)


def _state(
    before: TrainState,
    config: SessionConfig,
    sampler: PromptSampler,
    *,
    new_data: bool,
    from_start: bool,
) -> TrainState:
    """Counters, place in the data and history that a fork begins with."""
    state = TrainState(config) if from_start else before.twin(config)
    keep = sampler.fits if config.data.filter_overlong_prompts else None
    state.stream = PromptStream(sampler.train, config.seed, config.data.shuffle, keep)
    if new_data:
        state.buffer = RolloutBuffer()  # what waited were beginnings of answers to other prompts
    elif not from_start:
        state.stream.load_state(before.stream.state())
    return state


def _check_room(stack: Stack, name: str) -> None:
    """Raise SessionError where the host has no room for another adapter and optimizer."""
    need, free = stack.state_bytes(), int(free_memory() * (1 - SPARE))
    if need > free:
        raise SessionError(
            f"There is no room for the fork {name!r}, which takes {data_size(need)} of host "
            f"memory while it is not its turn; the host has {data_size(free)} to spare.",
            fix="close a fork, or release snapshots: session.forget(name).",
        )
