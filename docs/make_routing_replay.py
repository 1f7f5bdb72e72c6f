"""Make `docs/images/routing_replay.svg`: a mixture of experts trained with and without replay.

    .venv/bin/python docs/make_routing_replay.py [--seeds 3] [--steps 20]      some minutes on a CPU

The mixture has random weights: five layers of 32 experts after a dense one, whose outputs are large
beside what they are added to, so that it matters which expert a token takes. It learns to write
digits. The engine's weights are the trainer's with noise of a thousandth (`engine.weight_noise`),
which moves some tokens to other experts.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit import RLSession, SessionConfig
from kit.samples import Sample
from kit.tiny import MODEL_DIR

PICTURE = Path(__file__).parent / "images" / "routing_replay.svg"
STYLE = Path(__file__).parents[1] / "kit" / "viz" / "notebook.mplstyle"
LENGTH = 16
NOISE = 0.001
LOUD = 5.0
"""What the experts' outputs are multiplied by."""
PANELS = {
    "train/train_rollout_logprob_abs_diff": "mean |trainer - engine| log-prob, nats",
    "train/train_rollout_kl": "KL of engine and trainer, nats a token",
    "rollout/raw_reward": "share of digits",
}
Rows = list[Mapping[str, float]]


def make_mixture(folder: Path) -> Path:
    """Write the model, with the tiny model's tokenizer; returns the folder."""
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=104,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=6,
        mlp_only_layers=[0],
        num_experts=32,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3MoeForCausalLM(config).float()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("experts.down_proj"):
                value.mul_(LOUD)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(MODEL_DIR).save_pretrained(folder)
    return folder


def share_of_digits(sample: Sample) -> float:
    """Digits in the response, over the longest that it can be."""
    return sum(letter.isdigit() for letter in sample.response) / LENGTH


def train(model: Path, seed: int, steps: int, *, replays: bool) -> Rows:
    """Metrics of each step of a training."""
    config = SessionConfig.preset("tiny-moe")
    for key, value in {
        "name": "routing-replay",
        "model.name": str(model),
        "rollout.max_response_len": LENGTH,
        "engine.weight_noise": NOISE,
        "training.learning_rate": 1e-3,
        "training.use_rollout_routing_replay": replays,
        "seed": seed,
    }.items():
        config = config.replace(key, value)
    with RLSession.start(config, reward=share_of_digits) as session:
        for step in range(steps):
            session.step()
            row = session.history[-1]
            shown = ", ".join(f"{name} {row[name]:.3g}" for name in PANELS)
            print(f"seed {seed}, replay {replays}, step {step}: {shown}", flush=True)
        return list(session.history)


def draw(runs: Mapping[bool, list[Rows]]) -> None:
    """Write the picture: a panel a metric, a thin line a seed, both ways in one."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(fname=str(STYLE)):
        mpl.rcParams["svg.hashsalt"] = "kit"
        figure = Figure(figsize=(9.0, 2.9), layout="constrained")
        axes: Any = figure.subplots(1, len(PANELS))
        ways = ((False, "C1", "each for itself"), (True, "C0", "the engine's experts replayed"))
        for axis, (name, words) in zip(axes, PANELS.items(), strict=True):
            for replays, colour, label in ways:
                for number, rows in enumerate(runs[replays]):
                    said = label if not number else None
                    axis.plot([row[name] for row in rows], color=colour, label=said, linewidth=1.2)
            axis.set_title(words, fontsize=9)
            axis.set_xlabel("step")
            if name.startswith("train/"):
                axis.set_yscale("log")
        axes[1].legend(fontsize=8, loc="center", bbox_to_anchor=(0.5, 0.58))
        figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Train, draw, and print what the page says."""
    parser = argparse.ArgumentParser(description="Train a mixture with and without replay.")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--steps", type=int, default=20, help="steps of each")
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = make_mixture(Path(folder))
        runs: dict[bool, list[Rows]] = {False: [], True: []}
        for seed in range(wanted.seeds):
            for replays in (False, True):
                runs[replays].append(train(model, seed, wanted.steps, replays=replays))
    draw(runs)
    for name in PANELS:
        for replays, of_seeds in runs.items():
            first = ", ".join(f"{rows[0][name]:.3g}" for rows in of_seeds)
            last = ", ".join(f"{rows[-1][name]:.3g}" for rows in of_seeds)
            print(f"{name}, replay {replays}: step 0 {first}; step {wanted.steps - 1} {last}")


if __name__ == "__main__":
    main()
