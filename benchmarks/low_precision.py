"""What FP8 costs and saves on a GPU, and how near trainer and engine are with it.

    python -m benchmarks.low_precision                              # 0.6b and 4b, all ways
    python -m benchmarks.low_precision --parts kernels
    python -m benchmarks.low_precision --parts session --shapes 0.6b --ways unified --steps 50
    python -m benchmarks.low_precision --parts trainer --shapes 4b
    python -m benchmarks.low_precision --parts session --shapes tiny   # on a CPU, to try it

Models have the shapes of Qwen3 and random weights; the last norm is six times as large, so that
their distributions have peaks. A session makes steps of 32 prompts x 8 responses of 512 tokens, or
of `--response`. It
tells seconds by phase (medians after two steps), the mean log-prob difference of trainer and engine
over all steps, syncs and their checksums, what the engine's process holds of the card, what the
plan counts of its weights, and tokens a second of 256 requests decoded at once. Ways:

    bf16       trainer and engine in bfloat16
    rollout    the engine alone in FP8, with TIS (`engine.quantization`)
    unified    both in FP8 (`model.quantization`)
    exact      both in FP8, with `training.true_on_policy`
    plain      both in bfloat16, with `training.true_on_policy`
    cache      the engine alone in FP8, its keys and values too
    int4       both in INT4
    eight      both in bfloat16, the optimizer in 8 bits
    sglang     SGLang's own engine in bfloat16, with the session's arguments (`engines` alone)

`engines` starts an engine without a session for each way, all at once, and has them write one after
the other. `trainer` makes updates of the trainer alone: in bfloat16, in FP8 by the kernels, and
simulated, which multiplies what the codes stand for. With `--profile` both tell where the time
goes, by kernel. `kernels` compares bits and times products.
Other sides are processes of their own, one after the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.lora import PHASES, say, workload

WAYS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "rollout": {"engine.quantization": "fp8"},
    "unified": {"model.quantization": "fp8"},
    "exact": {"model.quantization": "fp8", "training.true_on_policy": True},
    "plain": {"training.true_on_policy": True},
    "cache": {"engine.quantization": "fp8", "engine.kv_cache_dtype": "fp8_e4m3"},
    "int4": {"model.quantization": "int4"},
    "eight": {"training.optimizer": "adamw8bit"},
    "sglang": {},
}
"""What the settings have on each side."""
TRAINED = ("bf16", "kernels", "simulated", "plain", "exact")
"""How the trainer alone computes: `plain` and `exact` as those ways, with `true_on_policy`."""
PEAKED = 6.0
"""Factor of the last norm: random logits are otherwise nearly equal."""
DECODED = 256
"""Tokens of each request that is decoded among others."""


def session(way: str, shape: str, folder: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Steps, syncs, checksums, memory and decoding of one session."""
    from benchmarks.gpu_parts.card import memory_by_process
    from benchmarks.gpu_parts.session import decoding_speed
    from benchmarks.gpu_parts.workload import reward
    from kit import RLSession

    work = workload(shape, folder)
    if asked.response:
        work = replace(work, response_tokens=asked.response)
    config = work.config()
    for name, value in WAYS[way].items():
        config = config.replace(name, value)
    # Where it differs by more than the default allows, what rounding does would be computed first.
    config = config.replace("mismatch.warn_above", 10.0).replace("mismatch.fail_above", 10.0)
    config = config.replace("memory.device_gib", asked.gib)
    if asked.no_compile:
        config = config.replace("model.compile", False)
    found: dict[str, Any] = {"rows": [], "gaps": [], "losses": [], "decode": {}}
    with RLSession.start(config, data=work.rows(), reward=reward) as running:
        found["start"] = running.start_seconds
        say(f"started in {running.start_seconds:.0f} s\n{running.memory_plan()}")
        found["card"] = memory_by_process()
        say(f"of the card: {found['card']}")
        for number in range(asked.steps):
            metrics = running.step().metrics
            found["rows"].append([metrics.get(name) for name in PHASES.values()])
            found["gaps"].append(metrics["train/train_rollout_logprob_abs_diff"])
            found["losses"].append([metrics["train/loss"], metrics["train/grad_norm"]])
            say(f"step {number}: {found['rows'][-1]} {found['gaps'][-1]:.3g} {found['losses'][-1]}")
            if number < 3:
                found["verified"] = running.sync(verify=True).verified
        say(f"checksums of {found.get('verified')} tensors equal after each of three syncs")
        found["plan"] = {
            phase.name: [phase.total, phase.measured, dict(phase.parts)]
            for phase in running.memory_plan().phases
        }
        found["sync"] = [running.sync().seconds for _ in range(6)]
        say(f"syncs: {found['sync']}")
        for count in asked.requests:
            speed = decoding_speed(running, work, count, min(DECODED, 20 * work.length))
            found["decode"][str(count)] = speed
            say(f"{count} decoded at once: {speed:.0f} tokens/s")
        found["mismatch"] = str(running.check_mismatch(running.generate()))
    return found


def engine(way: str, shape: str, folder: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of an engine without a session, once a line is read from stdin."""
    import os

    from benchmarks.gpu_parts import step_profile
    from benchmarks.gpu_parts.card import memory_by_process
    from benchmarks.gpu_parts.engine import prepare_cpu
    from kit.cluster.client import kept_kernels
    from kit.engine import patches
    from kit.engine.server_args import server_arguments
    from kit.memory.plan import plan_for
    from kit.models.source import find
    from kit.stack.actors import engine_settings
    from kit.stack.stack import Stack

    decoded = asked.response or DECODED
    work = replace(workload(shape, folder), response_tokens=decoded)
    config = work.config(engine={"max_total_tokens": max(asked.requests) * (work.length + 16)})
    for name, value in WAYS[way].items():
        config = config.replace(name, value)
    model = find(config.model)
    plan = plan_for(config, model, work.device, decoded)
    settings = engine_settings(Stack(config, model, work.device, decoded, plan).settings)
    os.environ |= kept_kernels()
    if work.device == "cpu":
        prepare_cpu()
    patches.import_only(settings.model_path)
    import sglang

    begun = time.perf_counter()
    engine_class = sglang.Engine if way == "sglang" else patches.engine_class(settings)
    running = engine_class(**server_arguments(settings))
    found: dict[str, Any] = {"start": time.perf_counter() - begun, "decode": {}}
    weights = dict(plan.phases[0].parts)["engine: weights"]
    found["planned_weights_gib"] = weights / 2**30
    try:
        print("ready", flush=True)
        sys.stdin.readline()
        found["card"] = {name: size / 2**30 for name, size in memory_by_process().items()}
        for count in asked.requests:
            prompts, seconds = work.token_rows(count), []
            for _ in range(1 + work.repeats):
                running.flush_cache()
                begun = time.perf_counter()
                running.generate(
                    input_ids=prompts,
                    sampling_params={"temperature": 1.0, "max_new_tokens": decoded},
                    return_logprob=True,
                )
                seconds.append(time.perf_counter() - begun)
            found["decode"][str(count)] = [count * decoded / took for took in seconds]
            say(f"{way}, {count} at once: {found['decode'][str(count)]} tokens/s")
            if asked.profile and count == asked.requests[0]:
                with tempfile.TemporaryDirectory() as place:
                    layers = work.shape["num_hidden_layers"]
                    steps = step_profile.profile(running, prompts, Path(place), layers)
                found["step"] = found.get("step", {}) | {str(count): steps}
                say(f"{way}, {count} at once, microseconds of a step: {steps['kinds']}")
    finally:
        running.shutdown()
    return found


def engines(shape: str, ways: list[str], command: list[str]) -> None:
    """Start an engine for each way at once, and have them write one after the other."""
    children = {
        way: subprocess.Popen(
            [*command, "--one", f"engine-{way}", shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for way in ways
    }

    def line(way: str, begins: str) -> str:
        """The next line of its own; others may print, too."""
        assert children[way].stdout is not None
        return next((x for x in children[way].stdout or () if x.startswith(begins)), "")

    for way in ways:
        found = ""
        if line(way, "ready"):
            assert children[way].stdin is not None
            children[way].stdin.write("\n")  # type: ignore[union-attr]
            children[way].stdin.flush()  # type: ignore[union-attr]
            found = line(way, "{")
        print(f"{shape}, engine, {way}: {found.strip() or 'failed'}", flush=True)
    for child in children.values():
        child.communicate()


def trainer(shape: str, folder: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds of updates of the trainer alone, by how it computes."""
    import os

    from benchmarks.gpu_parts import update_profile
    from benchmarks.gpu_parts.training import forget, start, train_batch
    from kit.cluster.client import kept_kernels
    from kit.config import QuantizationConfig

    os.environ |= kept_kernels()
    import torch

    from kit.models import low_precision

    work = replace(workload(shape, folder), prompts=asked.prompts)
    batch, own_use = train_batch(work), low_precision.use
    found: dict[str, Any] = {"tokens": work.samples * work.length}
    for how in asked.trained:
        training = work.config(training={"true_on_policy": how in ("exact", "plain")}).training
        further: dict[str, Any] = {"training": training, "max_tokens": asked.tokens}
        if how not in ("bf16", "plain"):
            further |= {"quantization": QuantizationConfig(method="fp8"), "trains_quantized": True}
        if asked.no_compile:
            further["compile"] = False
        if how == "simulated":
            low_precision.use = lambda model, scheme, _gpu=None: own_use(model, scheme)
        with tempfile.TemporaryDirectory() as place:
            begun = time.perf_counter()
            made = start(work, "selective", Path(place) / "meet", **further)
            up = time.perf_counter() - begun
            made.update(batch, f"{how} first")
            if work.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = []
            for number in range(3):
                begun = time.perf_counter()
                made.update(batch, f"{how} {number}")
                seconds.append(time.perf_counter() - begun)
            peak = torch.cuda.max_memory_allocated() / 2**30 if work.device == "cuda" else 0.0
            found[how] = {"up": up, "seconds": seconds, "peak_gib": peak}
            if asked.profile:
                again = partial(made.update, batch, f"{how} profiled")
                found[how]["profile"] = update_profile.profile(again)
            say(f"{how}: {found[how]}")
            del made
            forget(torch)
        low_precision.use = own_use
    return found


def shown(name: str, found: dict[str, Any]) -> str:
    """A session's results as lines."""
    rows = found["rows"][2:] or found["rows"]
    lines = [f"{name}: started in {found['start']:.0f} s"]
    for place, phase in enumerate(PHASES):
        values = [row[place] for row in rows if row[place] is not None]
        if values:
            lines.append(f"  {phase}: {statistics.median(values):.3f} s")
    lines.append(f"  sync, called: {statistics.median(found['sync'][1:]) * 1000:.1f} ms")
    for phase, (planned, measured, parts) in found["plan"].items():
        if measured:
            lines.append(
                f"  memory, {phase}: planned {planned / 2**30:.2f} GiB, measured "
                f"{measured / 2**30:.2f} ({measured / planned - 1:+.1%})"
            )
        weights = [size for part, size in parts.items() if part == "engine: weights"]
        lines += [f"  {phase}: engine weights planned {size / 2**30:.3f} GiB" for size in weights]
    lines += [f"  {who}: {size / 2**30:.2f} GiB of the card" for who, size in found["card"].items()]
    for count, rate in found["decode"].items():
        lines.append(f"  {count} decoded at once: {rate:.0f} tokens/s")
    gaps, losses = found["gaps"], [x for pair in found["losses"] for x in pair]
    lines.append(
        f"  mean |trainer - engine|: {statistics.mean(gaps):.4g} nats, {min(gaps):.4g} to "
        f"{max(gaps):.4g} in {len(gaps)} steps"
    )
    bad = sum(value != value or abs(value) == float("inf") for value in losses)
    lines.append(f"  losses and gradient norms that are no number: {bad} of {len(losses)}")
    lines.append(f"  tensors compared by checksum: {found.get('verified')}")
    return "\n".join([*lines, *(f"  {line}" for line in found["mismatch"].splitlines()[:6])])


def peaked(directory: Path) -> None:
    """Make the model's last norm larger in its files."""
    import torch
    from safetensors.torch import load_file, save_file

    for file in directory.glob("*.safetensors"):
        weights = load_file(file)
        if "model.norm.weight" in weights:
            weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], PEAKED)
            save_file(weights, file, metadata={"format": "pt"})


def one_side(asked: argparse.Namespace) -> None:
    """Measure one thing in this process, and print it as JSON."""
    what, shape = asked.one
    if what == "model":
        from benchmarks.gpu_parts.card import make_model

        make_model(workload(shape, asked.directory))
        peaked(Path(workload(shape, asked.directory).model))
        return
    if what in ("bits", "times"):
        from benchmarks.gpu_parts import fp8_products

        found = fp8_products.compare(say) if what == "bits" else fp8_products.time(say, shape)
    elif what == "trainer":
        found = trainer(shape, asked.directory, asked)
    elif what.startswith("engine-"):
        found = engine(what.removeprefix("engine-"), shape, asked.directory, asked)
    else:
        found = session(what, shape, asked.directory, asked)
    print(json.dumps(found), flush=True)


def main() -> None:
    """Measure, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default="0.6b,4b", help="of 4b, 0.6b and tiny (on a CPU)")
    parser.add_argument("--ways", default="bf16,rollout,unified", help=f"of {', '.join(WAYS)}")
    parser.add_argument("--parts", default="kernels,session,engines,trainer")
    parser.add_argument("--trained", default=list(TRAINED), type=lambda text: text.split(","))
    parser.add_argument("--prompts", type=int, default=32, help="of the trainer's batch")
    parser.add_argument("--tokens", type=int, default=16384, help="of its micro-batches")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--gib", type=float, help="the session's budget")
    parser.add_argument("--response", type=int, default=0, help="tokens of a response")
    parser.add_argument(
        "--requests", default=[256], type=lambda t: [int(n) for n in t.split(",") if n]
    )
    parser.add_argument("--profile", action="store_true", help="engines' steps and updates")
    parser.add_argument("--no-compile", action="store_true", help="of the trainer's layers")
    parser.add_argument("--directory", help="where the models are, or are written to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one_side(asked)
        return
    parts = asked.parts.split(",")
    with tempfile.TemporaryDirectory() as folder:
        directory = asked.directory or folder
        sides = [("bits", "all"), ("times", asked.shapes)] if "kernels" in parts else []
        for shape in asked.shapes.split(","):
            there = (Path(workload(shape, directory).model) / "config.json").exists()
            wanted = asked.ways.split(",") if "session" in parts else []
            wanted += [part for part in ("engines", "trainer") if part in parts]
            sides += [(side, shape) for side in ([] if there or not wanted else ["model"]) + wanted]
        command = [sys.executable, "-m", __spec__.name, "--directory", directory]
        command += ["--steps", str(asked.steps), "--response", str(asked.response)]
        command += ["--gib", str(asked.gib)] if asked.gib else []
        command += ["--requests", ",".join(map(str, asked.requests))]
        command += ["--trained", ",".join(asked.trained), "--prompts", str(asked.prompts)]
        command += ["--tokens", str(asked.tokens)]
        command += ["--no-compile"] * asked.no_compile + ["--profile"] * asked.profile
        for side, shape in sides:
            if side == "engines":
                engines(shape, asked.ways.split(","), command)
                continue
            asking = [*command, "--one", side, shape]
            done = subprocess.run(asking, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{shape}, {side}: failed", flush=True)
            elif side != "model":
                found = json.loads(done.stdout.splitlines()[-1])
                name = f"{shape}, {side}"
                print(shown(name, found) if side in WAYS else f"{name}: {found}", flush=True)


if __name__ == "__main__":
    main()
