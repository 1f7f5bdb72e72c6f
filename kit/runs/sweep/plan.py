"""Plan of a sweep: a grid of parameter values times seeds, checked before anything starts.

lr 1e-5,1e-4            two values of one parameter
sizes "[1, 2],[4]"      two lists: commas inside of brackets, braces and quotes do not separate
name '"a, b",c'         two words, the first with a comma: quotes around a value are taken off
steps 30                one value, the same for every member

Members run one a GPU, or each on a share of the cores.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.cluster.processes import CORES_VARIABLE, cores
from kit.config.training import CLIP_SETTINGS, EQUAL_AT_RATIO_1, RATIO_STAYS_1
from kit.errors import RunError
from kit.reports.runs import RunSettings
from kit.runs.overrides import SEED, for_notebook
from kit.runs.parameters import Parameter, check_parameters, open_notebook, read_parameters
from kit.tracking.recorder import GROUP_VARIABLE, RUN_DIR_VARIABLE
from kit.utils.formatting import count
from kit.utils.hardware import VISIBLE, visible_gpus
from kit.utils.reading import parse_json

MOST_MEMBERS = 1_000
"""More are most likely a mistake."""
_OPEN, _CLOSE = "[{(", "]})"


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The members of a sweep, in the order in which they start."""

    notebook: Path
    fixed: dict[str, Any]
    """Values that every member is given."""
    grid: dict[str, list[Any]]
    """Parameters with several values."""
    seeds: list[int] = field(default_factory=list)
    """Empty where the notebook's own seed stays."""

    @property
    def axes(self) -> dict[str, list[Any]]:
        """What is combined: the grid, and the seeds, which vary fastest."""
        return self.grid | ({SEED: self.seeds} if self.seeds else {})

    def members(self) -> list[dict[str, Any]]:
        """Parameters of each member that differ from the notebook's."""
        combinations = itertools.product(*self.axes.values())
        return [self.fixed | dict(zip(self.axes, values, strict=True)) for values in combinations]


def plan_sweep(
    notebook: str | Path,
    given: Mapping[str, object] | Sequence[tuple[str, str]],
    seeds: int | Sequence[int] = (),
) -> SweepPlan:
    """Plan a sweep over the given values.

    Args:
        notebook: its parameters say which names and types there are.
        given: by name, text as on the command line or a list of Python values; anything else is
            one value for all. As pairs, a name may come several times, and its values add up.
        seeds: a number N, for the seeds 0 to N - 1, or the seeds themselves.

    Raises:
        RunError: an unknown parameter, a value of the wrong type, one given twice, seeds for a
            notebook that has no use for them.
    """
    source = Path(notebook)
    known = read_parameters(source)
    values: dict[str, list[object]] = {}
    for name, value in given.items() if isinstance(given, Mapping) else given:
        values.setdefault(name, []).extend(_several(name, value))
    checked = {name: _checked(source, known, name, texts) for name, texts in values.items()}
    plan = SweepPlan(
        source.resolve(),
        fixed={name: found[0] for name, found in checked.items() if len(found) == 1},
        grid={name: found for name, found in checked.items() if len(found) > 1},
        seeds=_seeds(source, known, seeds, checked),
    )
    if (members := math.prod(map(len, plan.axes.values()))) > MOST_MEMBERS:
        raise _too_many(members)
    for name, found in [*checked.items(), (SEED, plan.seeds)]:
        for value in found if name in known else ():
            as_text(known[name], value)  # said before anything starts
    return plan


def notes(plan: SweepPlan) -> list[str]:
    """What is to know of a plan before it runs: members that would compute the same."""
    setting = re.compile("global_batch_size|epochs_per_rollout|use_rollout_logprobs")
    if any(setting.search(cell.source) for cell in open_notebook(plan.notebook).cells):
        return []  # the notebook knows of them
    found = []
    for name, values in plan.grid.items():
        alike = [value for value in values if value in EQUAL_AT_RATIO_1]
        if name.removeprefix("training.") in CLIP_SETTINGS:
            alike = values
        if len(alike) > 1:
            same = f"{name} {', '.join(map(str, alike))}"
            found.append(f"! {same}: equal curves where, as by default, {RATIO_STAYS_1}.")
    return found


def split_values(text: str) -> list[str]:
    """Split at commas, except inside of brackets, braces and quotes.

    Raises:
        ValueError: a part is empty, or a bracket or quote has no other end.
    """
    parts: list[str] = []
    waiting: list[str] = []
    part = quote = ""
    for sign in text:
        if quote:
            closes = sign == quote and not (quote == '"' and _escaped(part))
            quote = "" if closes else quote
        elif sign in "\"'" and (waiting or not part.strip()):
            quote = sign
        elif sign in _OPEN:
            waiting.append(_CLOSE[_OPEN.index(sign)])
        elif waiting and sign == waiting[-1]:
            waiting.pop()
        elif sign == "," and not waiting:
            parts.append(part.strip())
            part = ""
            continue
        part += sign
    parts.append(part.strip())
    if quote or waiting:
        raise ValueError(f"{quote or waiting[-1]} is missing at its end")
    if len(parts) > 1 and "" in parts:
        raise ValueError("there is nothing between two commas")
    return [_unquoted(part) for part in parts]


def as_text(parameter: Parameter, value: Any) -> str:
    """Write a value as `kit run -p` takes it.

    Raises:
        RunError: no text is read back as this value.
    """
    if isinstance(value, str):
        text = json.dumps(value) if not parameter.kinds else value
    else:
        text = "none" if value is None else json.dumps(value)
    if (read := parameter.convert(text)) != value or type(read) is not type(value):
        raise RunError(
            f"Parameter {parameter.name!r} cannot be given {value!r}: it would read {read!r}.",
            fix=f"write its type in the notebook, such as `{parameter.name}: str`.",
        )
    return text


def _several(name: str, value: object) -> list[object]:
    if not isinstance(value, str):
        return list(value) if isinstance(value, (list, tuple)) else [value]
    try:
        return [*split_values(value)]
    except ValueError as error:
        raise RunError(
            f"The values of {name!r} cannot be told apart in {value!r}: {error}.",
            fix="separate values by commas; put one that holds a comma into quotes: "
            f"-p {name} '\"a, b\",c'.",
        ) from None


def _checked(
    source: Path, known: Mapping[str, Parameter], name: str, values: Sequence[object]
) -> list[Any]:
    """Convert the values as the notebook gets them."""
    found: list[Any] = []
    for value in values:
        try:
            (typed,) = check_parameters(source, known, {name: value}).values()
        except RunError as error:
            if name not in known or known[name].kinds != ("list",):
                raise
            fix = f"{error.fix} A comma separates members; write a list in brackets: [1, 2],[4]."
            raise RunError(error.what, why=error.why, fix=fix) from None
        if typed in found:
            raise RunError(
                f"Parameter {name!r} is given {typed!r} twice.",
                fix="leave one of them out; `--seeds` repeats a member with other seeds.",
            )
        found.append(typed)
    if not found:
        raise RunError(f"Parameter {name!r} is given no value.", fix="give one, or leave it out.")
    return found


def _seeds(
    source: Path,
    known: Mapping[str, Parameter],
    seeds: int | Sequence[int],
    given: Mapping[str, object],
) -> list[int]:
    if isinstance(seeds, int) and seeds < 1:
        raise RunError(f"--seeds is {seeds}.", fix="give a number of 1 or more, or leave it out.")
    if isinstance(seeds, int) and seeds > MOST_MEMBERS:  # their list alone may fill the memory
        raise _too_many(seeds)
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not wanted:
        return []
    if SEED in given:
        raise RunError(
            "Seeds are given twice, by --seeds and by -p seed.", fix="leave one of them out."
        )
    if len(set(wanted)) < len(wanted):
        raise RunError(f"--seeds names a seed twice: {wanted}.", fix="leave one of them out.")
    if SEED not in known:  # its sessions are told, if it starts any
        for_notebook(source, known, {}, RunSettings(seed=wanted[0]))
        return wanted
    return [int(known[SEED].convert(seed)) for seed in wanted]


def _too_many(members: int) -> RunError:
    return RunError(
        f"The sweep would have {members:,} members, more than {MOST_MEMBERS:,}.",
        fix="give fewer values or seeds (`--seeds N` are the seeds 0 to N - 1), and sweep in "
        "several parts.",
    )


def _escaped(before: str) -> bool:
    """Whether a backslash escapes the next character, as in JSON."""
    return (len(before) - len(before.rstrip("\\"))) % 2 == 1


def _unquoted(part: str) -> str:
    if part[:1] == '"':
        with suppress(ValueError):
            return str(parse_json(part))
    quoted = len(part) > 1 and part[0] in "\"'" and part.find(part[0], 1) == len(part) - 1
    return part[1:-1] if quoted else part


@dataclass(frozen=True, slots=True)
class Place:
    """A device, or some cores, for one member at a time; successive members share a warm stack."""

    words: str
    """`GPU 0`, or `2 cores`."""
    settings: dict[str, str]
    """What a member finds in its environment."""
    group: str = field(default_factory=lambda: secrets.token_hex(8))

    def environment(self) -> dict[str, str]:
        """The whole environment of a member."""
        inherited = {k: v for k, v in os.environ.items() if k != RUN_DIR_VARIABLE}
        return inherited | self.settings | {GROUP_VARIABLE: self.group}


def places(parallel: int | None = None) -> list[Place]:
    """Places for the members that run at once.

    Args:
        parallel: how many; None takes one a GPU, or one for every two cores where there is none.

    Raises:
        RunError: there are not so many GPUs, or cores.
    """
    if parallel is not None and parallel < 1:
        raise RunError(f"--parallel is {parallel}.", fix="give a number of 1 or more.")
    cards = visible_gpus()
    if cards:
        wanted = parallel or len(cards)
        if wanted > len(cards):
            raise RunError(
                f"--parallel is {wanted}, and there {_are(len(cards), 'GPU')}: a GPU has one "
                "session at a time.",
                fix=f"give {len(cards)} or less; `{VISIBLE}= kit sweep ...` runs on the CPU.",
            )
        return [Place(f"GPU {card}", {VISIBLE: card}) for card in cards[:wanted]]
    wanted = parallel or max(1, cores() // 2)
    if wanted > cores():
        raise RunError(
            f"--parallel is {wanted}, and there {_are(cores(), 'core')}: a session on the CPU "
            "keeps at least one busy.",
            fix=f"give {cores()} or less.",
        )
    share = cores() // wanted
    return [Place(count(share, "core"), {CORES_VARIABLE: str(share)}) for _ in range(wanted)]


def _are(number: int, what: str) -> str:
    return f"{'is' if number == 1 else 'are'} {count(number, what)}"
