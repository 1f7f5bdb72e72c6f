"""One GRPO iteration in the kit and in TRL, in turns, on this machine's CPU.

    python -m benchmarks.vs_trl                        # responses end where the model ends them
    python -m benchmarks.vs_trl --mode full            # every response has all 32 tokens
    python -m benchmarks.vs_trl --pairs 30 --json out.json

An iteration is: generate 128 responses (16 prompts x 8) with the embedded model, grade them, one
AdamW step over all of them, and whatever it takes until the next one can start. Both sides get the
same prompts in the same order, the same weights, reward, loss, optimizer and clipping, in float32,
and all cores. They run in turns, each sleeping while the other is measured, and are compared pair
by pair: what else the machine does hits both.

TRL is not a dependency of the kit: `uv pip install --group bench -c requirements.lock`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from benchmarks.trl_side import Iteration, serve
from kit import RLSession, SessionConfig
from kit.tiny import MODEL_DIR, rows

Mode = Literal["natural", "full"]
RESPONSE_TOKENS = 32
WARM_UPS = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """The kit's iteration, and TRL's that came right after it."""

    kit: Iteration
    trl: Iteration


def settings(model: Path) -> SessionConfig:
    """The settings of both sides."""
    return SessionConfig(
        name="vs-trl",
        device="cpu",
        model={"name": str(model), "dtype": "float32"},
        data={"shuffle": False},
        reward={"name": "exact"},
        rollout={"max_response_len": RESPONSE_TOKENS, "temperature": 1.0},
        training={
            "rollout_batch_size": 16,
            "n_samples_per_prompt": 8,
            "learning_rate": 1e-4,
            "adam_beta1": 0.9,
            "adam_beta2": 0.98,
            "weight_decay": 0.0,
            "clip_grad": 1.0,
            "eps_clip": 0.2,
            "eps_clip_high": 0.28,
            "kl_loss_coef": 0.0,
        },
    )


def endless_model(directory: Path) -> Path:
    """A copy of the embedded model that names no token as the end of a response."""
    model = Path(shutil.copytree(MODEL_DIR, directory / "model"))
    for name in ("config.json", "generation_config.json"):
        file = model / name
        values = json.loads(file.read_text())
        file.write_text(json.dumps(values | {"eos_token_id": None}))
    return model


def kit_iteration(session: RLSession) -> Iteration:
    """One `step()`, timed from outside."""
    begin = time.perf_counter()
    report = session.step()
    seconds = time.perf_counter() - begin
    rollout = report.rollout
    return Iteration(
        seconds=seconds,
        generate_seconds=rollout.seconds,
        tokens=sum(sample.response_length for sample in rollout),
        prompts=tuple(sample.prompt_text for sample in rollout),
        reward=rollout.mean_reward(),
    )


def measure(mode: Mode, pairs: int, say: Callable[[str], None]) -> list[Pair]:
    """Run both sides in turns; the warm-ups are not in the result."""
    questions = [
        {"prompt": row["prompt"], "label": row["label"]} for row in rows("addition", "train")
    ]
    spawn = multiprocessing.get_context("spawn")
    with ExitStack() as cleanup:
        directory = Path(cleanup.enter_context(tempfile.TemporaryDirectory()))
        config = settings(endless_model(directory) if mode == "full" else MODEL_DIR)
        ours, theirs = spawn.Pipe()
        total = WARM_UPS + pairs
        # One iteration more, because TRL reports one when it is about to begin the next.
        arguments = (theirs, config, questions, mode == "full", total + 1)
        child = spawn.Process(target=serve, args=arguments, daemon=True)
        say("starting the kit, then TRL ...")
        session = cleanup.enter_context(RLSession.start(config, data=questions))
        child.start()
        cleanup.callback(child.kill)
        theirs.close()  # so that the child's death ends our waiting
        ours.recv()
        counted = []
        for number in range(total):
            kit = kit_iteration(session)
            ours.send("step")
            trl: Iteration = ours.recv()
            if kit.prompts != trl.prompts:
                raise SystemExit(f"pair {number}: the two sides were not asked the same prompts")
            say(
                f"{'warm-up' if number < WARM_UPS else 'pair':>8} {number + 1:>3}   "
                f"kit {kit.seconds:6.3f} s ({kit.tokens} tokens)   "
                f"TRL {trl.seconds:6.3f} s ({trl.tokens} tokens)"
            )
            if number >= WARM_UPS:
                counted.append(Pair(kit, trl))
    return counted


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `ratio` is how many times better the kit is."""

    name: str
    kit: list[float]
    trl: list[float]
    ratio: list[float]


def table(pairs: Sequence[Pair]) -> list[Row]:
    """What was measured, by quantity, one value a pair."""

    def seconds(name: str, of: Callable[[Iteration], float]) -> Row:
        kit, trl = [of(p.kit) for p in pairs], [of(p.trl) for p in pairs]
        return Row(name, kit, trl, [theirs / ours for ours, theirs in zip(kit, trl, strict=True)])

    def rate(name: str, of: Callable[[Iteration], float]) -> Row:
        kit, trl = (
            [p.kit.tokens / of(p.kit) for p in pairs],
            [p.trl.tokens / of(p.trl) for p in pairs],
        )
        return Row(name, kit, trl, [ours / theirs for ours, theirs in zip(kit, trl, strict=True)])

    return [
        seconds("seconds an iteration", lambda i: i.seconds),
        seconds("  of it generating", lambda i: i.generate_seconds),
        seconds("  of it the rest", lambda i: i.seconds - i.generate_seconds),
        rate("tokens/s, iteration", lambda i: i.seconds),
        rate("tokens/s, generating", lambda i: i.generate_seconds),
    ]


def text(mode: Mode, pairs: Sequence[Pair]) -> str:
    """The table as a person reads it: medians, and the ratio of each pair."""
    lines = [
        f"{len(pairs)} pairs, mode {mode}, 128 responses of up to {RESPONSE_TOKENS} tokens, "
        f"{os.cpu_count()} cores; medians",
        "",
        f"{'':24}{'kit':>10}{'TRL':>10}{'kit is better by':>20}{'min':>8}{'max':>8}",
    ]
    for row in table(pairs):
        kit, trl = statistics.median(row.kit), statistics.median(row.trl)
        form = ",.0f" if "tokens/s" in row.name else ".3f"
        lines.append(
            f"{row.name:24}{kit:>10{form}}{trl:>10{form}}"
            f"{statistics.median(row.ratio):>19.2f}x{min(row.ratio):>8.2f}{max(row.ratio):>8.2f}"
        )
    return "\n".join(lines)


def report(mode: Mode, pairs: Sequence[Pair], load: Sequence[float]) -> dict[str, Any]:
    """Everything, for a file."""
    return {
        "mode": mode,
        "pairs": [
            {"kit": _without_prompts(pair.kit), "trl": _without_prompts(pair.trl)} for pair in pairs
        ],
        "medians": {
            row.name.strip(): {
                "kit": statistics.median(row.kit),
                "trl": statistics.median(row.trl),
                "ratio": statistics.median(row.ratio),
                "ratio_min": min(row.ratio),
                "ratio_max": max(row.ratio),
            }
            for row in table(pairs)
        },
        "machine": {
            "cores": os.cpu_count(),
            "platform": platform.platform(),
            "load_before_and_after": list(load),
        },
        "versions": {name: version(name) for name in ("torch", "transformers", "sglang", "trl")},
    }


def _without_prompts(iteration: Iteration) -> dict[str, Any]:
    return {name: value for name, value in asdict(iteration).items() if name != "prompts"}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print the table, and write the file that `--json` names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=15, help="counted pairs (default: 15)")
    parser.add_argument(
        "--mode",
        choices=["natural", "full"],
        default="natural",
        help="natural: a response ends where the model ends it; full: all have 32 tokens",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every number here")
    options = parser.parse_args(argv)
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    before = os.getloadavg()[0]
    pairs = measure(options.mode, options.pairs, say=lambda line: print(line, flush=True))
    print("\n" + text(options.mode, pairs))
    if options.json:
        load = (before, os.getloadavg()[0])
        options.json.write_text(json.dumps(report(options.mode, pairs, load), indent=1) + "\n")
        print(f"\nwritten to {options.json}")


if __name__ == "__main__":
    main()
