"""Every estimator on the embedded model: does it learn, and how fast?

    python -m benchmarks.estimators                          # all, three seeds: docs/images/*.svg
    python -m benchmarks.estimators --only grpo ppo --seeds 0
    python -m benchmarks.estimators --study tis --steps 48   # a disturbed engine, with and without

Each run starts from the same half-able base model and trains on two-digit addition; accuracy is
greedy, on held-out problems. One setting each, the table's second column: everything else is the
`tiny` preset. Curves and table are written to `docs/`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kit import RLSession, SessionConfig

ROOT = Path(__file__).parents[1]
EVERY = 4
"""Steps between two evaluations."""


COLOURS = ["#2f86c9", "#d55e00", "#00936b", "#808080", "#b8629a", "#7d7fd1", "#8f7a1f", "#1f9aa8"]
"""Each stands out from a light page and from a dark one; a marker each says the same."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One line of the table: a name, and what it changes in the preset."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)

    def config(self, seed: int) -> SessionConfig:
        """The preset with the changes."""
        config = SessionConfig.preset("tiny").replace("seed", seed)
        for key, value in self.changes.items():
            config = config.replace(key, value)
        return config

    @property
    def setting(self) -> str:
        """The changes as a person writes them."""
        keys = {key.removeprefix("training."): value for key, value in self.changes.items()}
        return ", ".join(f"{key}: {value}" for key, value in keys.items())


def estimator(name: str, **training: Any) -> Contender:
    """A contender that changes the training section only."""
    changes = {"advantage_estimator": name, **training}
    return Contender(name, {f"training.{key}": value for key, value in changes.items()})


ESTIMATORS = [
    estimator("grpo"),
    estimator("dr_grpo"),
    estimator("rloo"),
    estimator("gspo", eps_clip=0.003, eps_clip_high=0.004, global_batch_size=64),
    estimator("cispo", eps_clip=1.0, eps_clip_high=2.0, global_batch_size=64),
    estimator("reinforce_plus_plus", kl_coef=0.001),
    estimator("reinforce_plus_plus_baseline", kl_coef=0.001),
    estimator("ppo", critic={"learning_rate": 1e-3}),
]
NOISY = {"engine.weight_noise": 1.0}
STUDIES = {
    "estimators": ESTIMATORS,
    "tis": [
        Contender("exact engine"),
        Contender("noisy engine", NOISY),
        Contender("noisy engine, TIS", {**NOISY, "training.use_tis": True}),
        Contender(
            "noisy engine, TIS clipped at 1",
            {**NOISY, "training.use_tis": True, "training.tis_clip": 1.0},
        ),
    ],
}


@dataclass(frozen=True, slots=True)
class Curve:
    """One run: held-out accuracy after so many steps."""

    name: str
    setting: str
    seed: int
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    seconds: float
    """Of the training steps, evaluations and start left out."""


def run(contender: Contender, seed: int, steps: int) -> Curve:
    """Train once from the base model."""
    with RLSession.start(contender.config(seed)) as session:
        at, accuracy, seconds = [0], [_accuracy(session)], 0.0
        for step in range(1, steps + 1):
            seconds += session.step().metrics["perf/step_time"]
            if step % EVERY == 0 or step == steps:
                at.append(step)
                accuracy.append(_accuracy(session))
    return Curve(contender.name, contender.setting, seed, tuple(at), tuple(accuracy), seconds)


def _accuracy(session: RLSession) -> float:
    """Of the weights that are trained, whatever is done to those that the engine has otherwise."""
    if not session.config.engine.disturbed:
        return session.evaluate().mean_reward
    session.sync(exact=True)
    accuracy = session.evaluate().mean_reward
    session.sync()
    return accuracy


def table(curves: Sequence[Curve], goal: float) -> str:
    """Markdown, one line a contender: its worst seed, and steps until the goal by seed."""
    lines = [
        f"| | what is set | final accuracy, by seed | steps to {goal:.2f} | s a step |",
        "|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(curve.name for curve in curves):
        own = [curve for curve in curves if curve.name == name]
        final = ", ".join(f"{curve.accuracy[-1]:.3f}" for curve in own)
        reached = ", ".join(_reached(curve, goal) for curve in own)
        seconds = sum(curve.seconds / curve.steps[-1] for curve in own) / len(own)
        setting = f"`{own[0].setting}`" if own[0].setting else ""
        lines.append(f"| {name} | {setting} | {final} | {reached} | {seconds:.2f} |")
    return "\n".join(lines) + "\n"


INTRO = """# {title}

Held-out accuracy of the embedded model on two-digit addition, greedy, while it trains: the mean
over seeds {seeds}, and their range as a band. Made by `python -m benchmarks.estimators --study
{study} --steps {steps}`; every contender is the `tiny` preset (16 prompts x 8 samples a step) with
what the second column sets. Seconds are those of a shared machine, and say nothing beyond it.
{about}
![Curves](images/{study}.svg)

"""
TITLES = {"estimators": "Every estimator", "tis": "A disturbed engine, with and without TIS"}
ABOUT = {
    "estimators": """
With one optimizer step an update, as in that preset, the probability ratio stays 1: nothing is
clipped, and `grpo`, `gspo` and `cispo` have one and the same gradient. They differ from the second
optimizer step on, which is why the table sets `global_batch_size` for two of them
(`epochs_per_rollout` does it too). `kit sweep` says so before it runs, `kit compare` and
`session.what_if` where it happened.
""",
    "tis": """
The noisy engine writes its samples with other weights than those that are trained: normal noise as
large as the weights themselves is added to every matrix, and drawn anew at each sync. The update
then learns from what another policy wrote. Truncated importance sampling (TIS) weights each token
by how likely the trained policy finds it against the one that wrote it, up to `tis_clip`. Accuracy
is that of the trained weights, without the noise.
""",
}


def page(study: str, curves: Sequence[Curve], goal: float) -> str:
    """The study as a page of documentation."""
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(curve.seed for curve in curves))
    head = INTRO.format(
        title=TITLES[study],
        study=study,
        seeds=seeds,
        steps=curves[0].steps[-1],
        about=ABOUT.get(study, ""),
    )
    return head + table(curves, goal)


def _reached(curve: Curve, goal: float) -> str:
    pairs = zip(curve.steps, curve.accuracy, strict=True)
    return next((str(step) for step, value in pairs if value >= goal), "not")


def draw(curves: Sequence[Curve], file: Path) -> None:
    """All curves in one picture: the mean over seeds, and the range as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    plt.style.use("kit.viz.notebook")
    mpl.rcParams |= {"svg.hashsalt": "kit", "svg.fonttype": "path"}
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for index, name in enumerate(dict.fromkeys(curve.name for curve in curves)):
        own = [curve.accuracy for curve in curves if curve.name == name]
        steps = next(curve.steps for curve in curves if curve.name == name)
        by_step = list(zip(*own, strict=True))
        mean = [sum(values) / len(values) for values in by_step]
        colour, mark = COLOURS[index % len(COLOURS)], "os^DvPX*"[index % 8]
        axes.plot(steps, mean, label=name, color=colour, marker=mark, markersize=5, linewidth=1.5)
        low, high = [min(v) for v in by_step], [max(v) for v in by_step]
        axes.fill_between(steps, low, high, color=colour, alpha=0.12, linewidth=0)
    bottom = min(value for curve in curves for value in curve.accuracy)
    axes.set(xlabel="step", ylabel="held-out accuracy (greedy)", ylim=(bottom - 0.03, 1.01))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Run, draw, and write the table and the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--study", choices=STUDIES, default="estimators")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="some contenders only")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--goal", type=float, default=0.85, help="accuracy that counts as solved")
    parser.add_argument("--fresh", action="store_true", help="train again what is in the file")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", metavar="DIRECTORY")
    options = parser.parse_args(argv)
    contenders = STUDIES[options.study]
    unknown = set(options.only or []) - {c.name for c in contenders}
    if unknown:
        parser.error(f"no contender {', '.join(sorted(unknown))} in {options.study}")
    file = options.out / f"{options.study}.json"
    done = [] if options.fresh or not file.exists() else read(file)
    curves: list[Curve] = []
    for contender in contenders:
        if options.only and contender.name not in options.only:
            continue
        for seed in options.seeds:
            wanted = (contender.name, contender.setting, seed, options.steps)
            same = [c for c in done if (c.name, c.setting, c.seed, c.steps[-1]) == wanted]
            curves.append(same[0] if same else run(contender, seed, options.steps))
            others = [c for c in done if c not in curves]
            file.write_text(json.dumps([asdict(c) for c in [*curves, *others]], indent=1) + "\n")
            print(
                f"{contender.name:30} seed {seed}   {curves[-1].accuracy[0]:.3f} -> "
                f"{curves[-1].accuracy[-1]:.3f}   at {options.goal:.2f} after "
                f"{_reached(curves[-1], options.goal)} steps",
                flush=True,
            )
    (options.out / "images").mkdir(parents=True, exist_ok=True)
    (options.out / f"{options.study}.md").write_text(page(options.study, curves, options.goal))
    draw(curves, options.out / "images" / f"{options.study}.svg")
    print("\n" + table(curves, options.goal))


def read(file: Path) -> list[Curve]:
    """The curves of earlier calls: what is in the file is not trained again."""
    return [
        Curve(**row | {"steps": tuple(row["steps"]), "accuracy": tuple(row["accuracy"])})
        for row in json.loads(file.read_text())
    ]


if __name__ == "__main__":
    main()
