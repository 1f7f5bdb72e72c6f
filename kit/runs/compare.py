"""`RunComparison`: runs side by side, those that differ only in their seed as one.

curves        the mean over the seeds of a group, and the range between their extremes
differences   parameters, settings and versions that are not the same in all groups
samples       what each group wrote to the same prompts, from their `samples.jsonl`
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kit.config import SessionConfig
from kit.config.training import RATIO_STAYS_1
from kit.errors import ConfigError, DataError, RunError, did_you_mean
from kit.reports import REWARD
from kit.reports.runs import Band, Difference, Group, RunComparison, RunInfo, Side
from kit.runs.index import resolve
from kit.runs.overrides import SEED
from kit.samples import Sample
from kit.tracking.run_files import RunFiles, told
from kit.tracking.run_folder import CONFIG, RUNS

USUAL = (REWARD, "rollout/response_len/mean", "train/entropy_loss", "train/grad_norm")
"""Metrics that are drawn unless others are asked for; evaluations come after the reward."""
_OF_A_RUN = (SEED, "name")
"""Settings in which runs differ without being another experiment; sessions that run side by side
get a number behind their name."""
NOT_THERE = "–"


def compare_runs(
    names: Sequence[str | Path],
    *,
    root: str | Path = RUNS,
    metrics: Sequence[str] | None = None,
    n: int = 8,
) -> RunComparison:
    """Lay runs side by side.

    Args:
        names: of runs or sweeps, as `kit compare` takes them.
        root: the folder that runs are kept in.
        metrics: what to draw beside the reward; None takes the usual ones.
        n: how many prompts are shown.

    Raises:
        RunError: no such run, or none of them logged such a metric.
    """
    runs = [_Run.read(info) for info in resolve(names, root)]
    drawn = _metrics(runs, metrics)
    together = _grouped(runs)
    labels = _labels(together)
    groups = tuple(
        Group(label, tuple(r.info for r in rs), _bands(rs, drawn))
        for label, rs in zip(labels, together, strict=True)
    )
    folders = [[run.info.folder for run in rs] for rs in together]
    rows, sampled = same_prompts(folders, n)
    return RunComparison(
        groups,
        drawn,
        _differences(together),
        _alike(together),
        rows,
        tuple([*_left_out(runs), *_uneven(groups), *_same_updates(together, labels), *sampled]),
    )


@dataclass(frozen=True, slots=True)
class _Run:
    """A run with what has to be read of its files."""

    info: RunInfo
    settings: Mapping[str, Any]
    """Settings of its session, by dotted name."""
    curves: Mapping[str, Mapping[int, float]]
    """By metric: step and value."""
    felt: SessionConfig | None = None
    """Its settings, without name, seed, and what an update does not feel."""

    @classmethod
    def read(cls, info: RunInfo) -> _Run:
        files = RunFiles(info.folder)
        curves: dict[str, dict[int, float]] = {}
        for row in files.metrics():
            for name, value in row.items():
                if value is not None and name != "step" and name[:5] != "eval/":
                    curves.setdefault(name, {})[row["step"]] = float(value)
        for row in files.evaluations():
            if (value := row["mean_reward"]) is not None:
                curves.setdefault(f"eval/{row['dataset']}", {})[row["step"]] = float(value)
        settings = dict(_flat(files.settings()))
        info = replace(info, faults=tuple(dict.fromkeys([*info.faults, *files.faults])))
        return cls(info, settings, curves, _felt(info.folder / CONFIG))

    def facts(self) -> dict[tuple[str, str], str]:
        """Everything that can tell it from other runs but its seed, by kind and name."""
        info = self.info
        parameters = {k: v for k, v in info.parameters.items() if k != SEED}
        settings = {k: v for k, v in self.settings.items() if k not in _OF_A_RUN}
        versions = {**info.versions, "commit": (info.git_commit or "").removesuffix("-dirty")}
        found = {("notebook", "notebook"): info.notebook} if info.parameters else {}
        if info.fork_of:
            found["setting", "fork"] = info.folder.name
        for kind, row in (
            ("parameter", parameters),
            ("setting", settings),
            ("version", {k: v for k, v in versions.items() if v}),
        ):
            found |= {(kind, name): _words(value) for name, value in row.items()}
        return found


def _grouped(runs: Iterable[_Run]) -> list[list[_Run]]:
    """Runs that differ only in their seed, together; in the order of their first."""
    groups: dict[str, list[_Run]] = {}
    for run in runs:
        key = json.dumps(sorted((*key, value) for key, value in run.facts().items()))
        groups.setdefault(key, []).append(run)
    return [sorted(g, key=lambda run: (run.info.seed or 0, run.info.name)) for g in groups.values()]


def _differences(groups: Sequence[Sequence[_Run]]) -> tuple[Difference, ...]:
    facts = [group[0].facts() for group in groups]  # a group's runs agree on them
    keys = dict.fromkeys(key for each in facts for key in each)
    found = (Difference(*key, tuple(each.get(key, NOT_THERE) for each in facts)) for key in keys)
    order = ("notebook", "parameter", "setting", "version", "machine")
    differing = [d for d in (*found, *_machines(groups)) if len({*d.values}) > 1]
    return tuple(sorted(differing, key=lambda d: order.index(d.kind)))


def _machines(groups: Sequence[Sequence[_Run]]) -> list[Difference]:
    """Machines of each group's runs; another machine alone makes no other curve."""
    names = dict.fromkeys(name for group in groups for run in group for name in run.info.machine)
    rows = []
    for name in names:
        found = (
            dict.fromkeys(_words(run.info.machine.get(name, NOT_THERE)) for run in group)
            for group in groups
        )
        rows.append(Difference("machine", name, tuple(" / ".join(each) for each in found)))
    return rows


def _alike(groups: Sequence[Sequence[_Run]]) -> dict[str, str]:
    facts = [group[0].facts() for group in groups]
    return {
        name: value
        for (kind, name), value in facts[0].items()
        if kind == "parameter" and all(each.get((kind, name)) == value for each in facts)
    }


def _labels(groups: Sequence[Sequence[_Run]]) -> list[str]:
    """A name for each group: that of its folder where a person chose it, else what differs."""
    names = [group[0].info.name for group in groups]
    if all(
        len(group) == 1 and not name[:8].isdigit()
        for group, name in zip(groups, names, strict=True)
    ):
        return names
    if len(groups) == 1:
        return [groups[0][0].info.notebook]
    rows = _differences(groups)
    for kinds in ("parameter", "parameter setting", "notebook parameter setting version"):
        told = [row for row in rows if row.kind in kinds.split()]
        labels = [
            ", ".join(f"{row.name.rpartition('.')[2]} {row.values[i]}" for row in told)
            for i in range(len(groups))
        ]
        if len({*labels}) == len(groups) and max(map(len, labels)) <= 60:
            return labels
    return names


def _bands(runs: Sequence[_Run], metrics: Iterable[str]) -> dict[str, Band]:
    """Mean and range of each metric at each step, over the runs that came so far."""
    bands = {}
    for name in metrics:
        curves = [run.curves[name] for run in runs if name in run.curves]
        steps = sorted({step for curve in curves for step in curve})
        values = [[curve[step] for curve in curves if step in curve] for step in steps]
        if curves:
            bands[name] = Band(
                tuple(steps),
                tuple(sum(v) / len(v) for v in values),
                tuple(map(min, values)),
                tuple(map(max, values)),
                len(curves),
                all(len(v) == len(curves) for v in values),
            )
    return bands


def _metrics(runs: Sequence[_Run], asked: Sequence[str] | None) -> tuple[str, ...]:
    known = dict.fromkeys(name for run in runs for name in run.curves)
    for name in asked or ():
        if name not in known:
            raise RunError(
                f"None of these runs logged {name!r}.",
                fix=did_you_mean(name, known) if known else "leave it out: they logged nothing.",
            )
    evaluations = [name for name in known if name.startswith("eval/")]
    wanted = [REWARD, *evaluations, *(USUAL[1:] if asked is None else asked)]
    return tuple(name for name in dict.fromkeys(wanted) if name in known)


def _left_out(runs: Iterable[_Run]) -> list[str]:
    """What of these runs cannot be read."""
    return [f"{run.info.name}: {told(run.info.faults)}" for run in runs if run.info.faults]


def _uneven(groups: Iterable[Group]) -> list[str]:
    """Groups whose curve is of fewer runs at its end."""
    notes = []
    for group in groups:
        if (band := group.bands.get(REWARD)) and not band.full:
            ends = ", ".join(str(run.steps) for run in group.runs)
            notes.append(
                f"{group.label}: its runs took {ends} steps. Behind the end of the shortest, the "
                "curve is the mean of the others."
            )
    return notes


def _same_updates(groups: Sequence[Sequence[_Run]], labels: Sequence[str]) -> list[str]:
    """Groups that differ only in settings which an update does not feel."""
    named = [(label, group[0]) for label, group in zip(labels, groups, strict=True)]
    return [
        f"{label} and {other} compute the same: {RATIO_STAYS_1}."
        for (label, run), (other, another) in itertools.combinations(named, 2)
        if _feel_the_same(run, another)
    ]


def _feel_the_same(run: _Run, other: _Run) -> bool:
    if run.felt is None or run.felt != other.felt:
        return False
    mine, theirs = run.facts(), other.facts()
    differing = [key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)]
    # A parameter that is not one of those settings may change what no setting says.
    said = {(mine.get(key), theirs.get(key)) for key in differing if key[0] == "setting"}
    return all(
        kind == "setting" or (mine.get((kind, name)), theirs.get((kind, name))) in said
        for kind, name in differing
    )


def _felt(file: Path) -> SessionConfig | None:
    """Settings of a run as its updates feel them; None where they cannot be read."""
    try:
        config = SessionConfig.load(file)
    except ConfigError:
        return None
    training = config.training.as_felt()
    return config.model_copy(update={"training": training, "name": "", "seed": 0})


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _words(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


_Kept = dict[int, dict[str, list[dict[str, Any]]]]
"""Rows of one run that are kept, by step and prompt."""
_Rows = tuple[tuple[Side | None, ...], ...]


def same_prompts(groups: Sequence[Sequence[Path]], n: int) -> tuple[_Rows, list[str]]:
    """The first `n` prompts that all groups answered, as late in training as there are any.

    Args:
        groups: the folders of each group's runs; the first that kept samples speaks for it.
        n: prompts.

    Returns:
        A row for each prompt, with None for groups that kept no samples; and what is to know.
    """
    kept = [next((k for folder in group if (k := _read(folder))), {}) for group in groups]
    those = [each for each in kept if each]
    if len(those) < min(len(groups), 2):
        return (), []
    notes = [] if all(kept) else ["Some runs kept no samples."]
    for step in sorted(set.intersection(*map(set, those)), reverse=True):
        shared = [p for p in those[0][step] if all(p in each[step] for each in those)]
        if shared:
            return _rows(kept, shared[:n], [dict.fromkeys(shared, step)] * len(kept)), notes
    latest = [{prompt: step for step in sorted(each) for prompt in each[step]} for each in kept]
    found = [p for p in latest[kept.index(those[0])] if all(p in each for each in latest if each)]
    if not found:
        return (), [*notes, "They have no prompt in common among the samples that they kept."]
    return _rows(kept, found[:n], latest), [*notes, "The samples are of different steps."]


def _rows(
    kept: Sequence[_Kept], prompts: Sequence[str], steps: Sequence[Mapping[str, int]]
) -> _Rows:
    return tuple(
        tuple(
            _side(at[prompt], each[at[prompt]][prompt]) if each else None
            for each, at in zip(kept, steps, strict=True)
        )
        for prompt in prompts
    )


def _side(step: int, rows: Sequence[dict[str, Any]]) -> Side:
    samples = [Sample.from_dict(row) for row in rows]
    rewards = [sample.reward for sample in samples if sample.reward is not None]
    mean = sum(rewards) / len(rewards) if rewards else None
    counted = Counter(sample.response for sample in samples)
    shown = max(samples, key=lambda sample: counted[sample.response])
    return Side(step, shown, len(rows), mean, counted[shown.response])


def _read(folder: Path) -> _Kept:
    kept: _Kept = {}
    for step, row in RunFiles(folder).samples():
        try:
            prompt = Sample.from_dict(row).prompt_text
        except DataError:
            continue  # of another version, or damaged
        kept.setdefault(step, {}).setdefault(prompt, []).append(row)
    return kept
