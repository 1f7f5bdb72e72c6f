"""Make `docs/images/speculative*.svg`: a draft that learns along, and the same one frozen.

    .venv/bin/python docs/make_speculative.py [--seeds 3] [--steps 60]      ten minutes on a CPU
    .venv/bin/python docs/make_speculative.py --ways "from distributions"   one way only, no picture

The tiny model, which adds in steps on the prompts of the preset tiny-chain, is paid for each step
that it writes, right or wrong, so that it comes to write what it never wrote before. Its engine
drafts with one of its layers, which `kit.make_draft` has taught before. Each seed trains three
times from the same weights and the same draft: the draft learns along (`training.draft`) from what
the policy wrote, or from the policy's distributions, or it stays. The picture shows the first and
the last.

`--algorithm eagle` drafts with a head on the policy's hidden states instead, which begins with
nothing. `--task` pays for right answers instead: the policy then becomes surer of what it wrote
already.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from kit import RLSession, SessionConfig, make_draft
from kit.drafts import LENGTH, RATE, DraftReport
from kit.samples import Sample

IMAGES = Path(__file__).parent / "images"
PICTURES = {
    "standalone": "speculative.svg",
    "eagle": "speculative_eagle.svg",
    "eagle3": "speculative_eagle3.svg",
}
STYLE = Path(__file__).parents[1] / "kit" / "viz" / "notebook.mplstyle"
PANELS = {
    RATE: "share of drafted tokens accepted",
    LENGTH: "tokens a pass",
    "rollout/raw_reward": "reward: steps written",
}
WAYS: dict[str, dict[str, Any] | None] = {
    "learns along": {"loss": "cross_entropy"},
    "from distributions": {"loss": "forward_kl"},
    "frozen": None,
}
DRAWN = {"learns along": "-", "frozen": "--"}
AROUND = 5
Rows = list[dict[str, float]]


def steps_written(sample: Sample) -> float:
    """A reward for steps, whatever they say."""
    return float(sample.response.count(">"))


def train(
    draft: DraftReport, seed: int, steps: int, learns: dict[str, Any] | None, *, task: bool
) -> Rows:
    """The metrics of each step."""
    config = SessionConfig.preset("tiny-chain").replace("seed", seed)
    config = config.replace("engine.speculative", draft.speculative)
    if learns is not None:
        config = config.replace("training.draft", learns)
    rows = []
    with RLSession.start(config, reward=None if task else steps_written) as session:
        for step in range(steps):
            metrics = session.step().metrics
            rows.append({name: metrics[name] for name in PANELS})
            if step % 10 == 9:
                told = ", ".join(f"{rows[-1][name]:.2f}" for name in PANELS)
                print(f"seed {seed}, draft {learns}: step {step + 1}: {told}", flush=True)
    return rows


def draw(runs: dict[str, list[Rows]], picture: Path) -> None:
    """Mean over seeds of each way, and their range as a band."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    plt.style.use(STYLE)
    mpl.rcParams |= {"svg.hashsalt": "kit", "svg.fonttype": "path"}
    figure, axes = plt.subplots(1, len(PANELS), figsize=(11, 3.4), layout="constrained")
    for panel, (name, words) in zip(axes, PANELS.items(), strict=True):
        for number, (way, style) in enumerate(DRAWN.items()):
            columns = [[row[name] for row in rows] for rows in runs[way]]
            by_step = list(zip(*columns, strict=True))
            steps, colour = range(len(by_step)), f"C{number}"
            panel.plot(
                steps,
                [statistics.fmean(values) for values in by_step],
                label=way,
                color=colour,
                linestyle=style,
            )
            low, high = [min(values) for values in by_step], [max(values) for values in by_step]
            panel.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.set(xlabel="step", title=words)
    axes[0].legend()
    figure.savefig(picture, metadata={"Date": None})


def main() -> None:
    """Train, draw, and print what the page says."""
    parser = argparse.ArgumentParser(description="Train with a draft that learns, and frozen.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=60, help="steps of each")
    parser.add_argument("--draft-steps", type=int, default=100, help="steps to make the draft")
    parser.add_argument("--algorithm", choices=PICTURES, default="standalone", help="what drafts")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=list(WAYS), help="of training")
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of the draft")
    parser.add_argument("--task", action="store_true", help="pay for right answers; draw nothing")
    wanted = parser.parse_args()
    runs: dict[str, list[Rows]] = {way: [] for way in wanted.ways}
    with tempfile.TemporaryDirectory() as folder:
        draft = make_draft(
            "tiny-chain",
            Path(folder) / "draft",
            algorithm=wanted.algorithm,
            steps=wanted.draft_steps,
        )
        print(draft, flush=True)
        for seed in range(wanted.seeds):
            for way in wanted.ways:
                learns = WAYS[way] and {**WAYS[way], "learning_rate": wanted.rate}
                runs[way].append(train(draft, seed, wanted.steps, learns, task=wanted.task))
    if not wanted.task and set(DRAWN) <= set(runs):
        draw(runs, IMAGES / PICTURES[wanted.algorithm])
    for name in PANELS:
        for way, of_seeds in runs.items():
            first, last = (
                ", ".join(
                    f"{statistics.fmean(r[name] for r in rows[part]):.3f}" for rows in of_seeds
                )
                for part in (slice(AROUND), slice(-AROUND, None))
            )
            print(f"{name}, {way}: first {AROUND} steps {first}; last {last}")


if __name__ == "__main__":
    main()
