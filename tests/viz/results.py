"""Realistic results, made by hand: two-digit additions, some right and some wrong."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from kit.doctor import Diagnosis, Finding
from kit.doctor.machine import compare_versions, host_memory
from kit.memory import Card, MemoryPlan, Phase
from kit.memory.plan import PhaseName
from kit.reports import (
    CheckReport,
    CurvePoint,
    EvalReport,
    Invariant,
    MismatchReport,
    SessionState,
    StepReport,
    SyncReport,
    TokenDifference,
    TrainingStatus,
    TrainReport,
    UpdateReport,
)
from kit.reports.status import LivingSession, Sessions
from kit.samples import Batch, Rollout, Sample, Status


def addition(
    group: int, index: int, right: bool, seed: int = 0, label: int | None = None
) -> Sample:
    """One answer to `a + b =`, a letter a token, with plausible log-probabilities."""
    chance = random.Random(seed * 10_000 + group)
    a, b = chance.randint(10, 99), chance.randint(10, 99)
    answer = a + b if right else a + b + chance.choice([-10, -1, 1, 10])
    response, prompt = str(answer), f"{a}+{b}="
    luck = random.Random(seed + 1000 * group + index)
    log_probs = [math.log(luck.choice([0.99, 0.93, 0.7, 0.3, 0.05, 0.004])) for _ in response]
    return Sample(
        group_index=group,
        index=index,
        prompt=prompt,
        tokens=[ord(c) - 32 for c in prompt + response],
        response=response,
        response_length=len(response),
        label=str(a + b if label is None else label),
        reward=1.0 if right else 0.0,
        status=Status.COMPLETED,
        rollout_log_probs=log_probs,
        weight_versions=[3],
    )


def make_rollout(
    groups: int = 10, size: int = 8, seed: int = 0, step: int = 3, right: float = 0.5
) -> Rollout:
    """Groups of which the second is all right and the third all wrong."""
    chance = random.Random(seed)
    samples = []
    for group in range(groups):
        share = {1: 1.1, 2: -1.0}.get(group, right)
        samples += [
            addition(group, group * size + i, chance.random() < share, seed) for i in range(size)
        ]
    return Rollout(samples, step=step, seconds=1.6)


def make_metrics(step: int, steps: int = 60) -> dict[str, float]:
    """One row of metrics of a run that learns, with some noise."""
    chance = random.Random(step)
    done = step / steps
    reward = 0.15 + 0.75 * (1 - math.exp(-4 * done)) + chance.gauss(0, 0.03)
    return {
        "rollout/raw_reward": reward,
        "rollout/response_len/mean": 2.9 + 0.4 * math.exp(-3 * done) + chance.gauss(0, 0.05),
        "rollout/truncated_ratio": max(0.0, 0.08 * math.exp(-6 * done)),
        "train/loss": chance.gauss(0, 0.004),
        "train/pg_loss": chance.gauss(0, 0.004),
        "train/entropy_loss": 1.1 * math.exp(-2 * done) + 0.1,
        "train/pg_clipfrac": 0.0,
        "train/ppo_kl": 0.0,
        "train/update_kl": 0.004,
        "train/grad_norm": 0.6 + 0.4 * math.exp(-3 * done) + chance.gauss(0, 0.05),
        "train/train_rollout_logprob_abs_diff": 2.1e-6,
        "perf/rollout_time": 1.6,
        "perf/actor_train_time": 0.9,
        "perf/update_weights_time": 0.05,
        "perf/step_time": 2.8,
    }


def make_update(step: int = 3, **changes: object) -> UpdateReport:
    row = {k: v for k, v in make_metrics(step).items() if k.startswith("train/")}
    report = UpdateReport(
        step=step, metrics=row, per_step=(row,), samples=128, tokens=1_024, seconds=0.9
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def make_mismatch(**changes: object) -> MismatchReport:
    report = MismatchReport(
        verdict="warn",
        cause="The rollout was written by weights version 2; the trainer is at 3. Generate again.",
        mean_abs_diff=0.034,
        max_abs_diff=0.81,
        kl_k1=-0.0004,
        kl_k3=0.0021,
        tokens=24_576,
        warn_above=0.02,
        fail_above=0.1,
        worst=(
            TokenDifference(3, 1, "7", -2.31, -1.5, "12+35=4", "<|end|>"),
            TokenDifference(11, 0, " therefore", -0.2, -0.61),
        ),
        trainer_version=3,
        rollout_versions=(2,),
        cause_kind="stale_weights",
        evidence=("weight versions: rollout 2, engine 2, trainer 3",),
        quantiles={0.5: 0.011, 0.9: 0.08, 0.99: 0.31, 0.999: 0.7},
        ratio_range=(0.66, 2.25),
        effective_sample_size=0.94,
        by_position=tuple(CurvePoint(p, p, 0.01 * (p + 1), 1024) for p in range(12)),
        by_probability=(CurvePoint(0.0, 0.5, 0.2, 900), CurvePoint(0.99, 1.0, 0.001, 9_000)),
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def make_check(**changes: object) -> CheckReport:
    report = CheckReport(
        invariants=(
            Invariant("ppo_kl at the first step", 0.0, "0 within 1e-09", True, "dropout breaks it"),
            Invariant("entropy, nats a token", float("nan"), "finite and above 0", False),
            Invariant("two syncs in a row", None, "0", None, "not looked at: sync first"),
        ),
        mismatch=make_mismatch(),
        seconds=0.4,
    )
    return replace(report, **changes)  # type: ignore[arg-type]


def make_sessions(name: str = "tiny", folder: str = "/home/me/work") -> Sessions:
    """One that is driven, one that waits for a kernel, one that is warm."""
    one = LivingSession(
        name=name,
        id="0123456789abcdef",
        device="cuda",
        step=12,
        driver=4711,
        folder=folder,
        warm=False,
        ends_in=None,
        age=3725.0,
        processes=11,
        memory=3_200_000_000,
        directory=Path("/tmp/kit-abcdefgh"),
    )
    waits = replace(one, name=f"{name}-2", driver=None, ends_in=250.0, device="cpu")
    return Sessions((one, waits, replace(waits, name=f"{name}-3", warm=True, step=None)))


def make_diagnosis() -> Diagnosis:
    """A machine whose driver is too old, and whose cache lacks half of the model."""
    return Diagnosis(
        "qwen3-0.6b",
        "Qwen/Qwen3-0.6B",
        (
            Finding("Python", "ok", "3.11.9 on Linux x86_64 (/opt/kit/.venv/bin/python)"),
            compare_versions({"sglang": "0.5.16", "torch": "2.11.0"}, {"torch": "2.11.0"}),
            Finding(
                "driver",
                "problem",
                "NVIDIA driver 570.86.15, for CUDA up to 12.8; the installed torch is made for "
                "CUDA 13.0, which this driver is too old for.",
                "Install a driver that runs CUDA 13.0 (in a container: on its host).",
                ("nvidia-smi",),
            ),
            Finding(
                "card 0",
                "note",
                "NVIDIA H100 80GB HBM3, compute capability 9.0, 79.2 GiB, 70.1 GiB of it free. "
                "9.1 GiB of it are taken: by process 4711 (python3.11, 9.0 GiB).",
                "If memory gets short, end what is not needed there.",
            ),
            Finding(
                "model",
                "problem",
                "Qwen/Qwen3-0.6B is not whole in /data/hub/models--Qwen--Qwen3-0.6B/snapshots/"
                "c1899de289a04d12100db370d81485cdf75e47ca: model.safetensors is missing.",
                "Where there is a network, this fetches what is missing.",
                ("hf download Qwen/Qwen3-0.6B",),
            ),
            Finding("prompts", "ok", "10,000 rows of reasoning_gym:gsm_symbolic"),
            host_memory(free=52 << 30, need=10 << 30),
        ),
        1.3,
    )


def make_evaluation(step: int = 3, right: float = 0.6, size: int = 1) -> EvalReport:
    rollout = make_rollout(groups=64, size=size, seed=7, step=step, right=right)
    return EvalReport(
        dataset="addition",
        mean_reward=rollout.mean_reward(),
        prompts=64,
        n_samples_per_prompt=size,
        temperature=0.0 if size == 1 else 1.0,
        pass_at_k={} if size == 1 else {1: 0.55, 2: 0.7, 4: 0.82},
        rollout=rollout,
        step=step,
        seconds=0.7,
    )


def make_step(step: int = 3, evaluated: bool = False) -> StepReport:
    return StepReport(
        step=step,
        metrics=make_metrics(step),
        rollout=make_rollout(step=step),
        update=make_update(step),
        sync=SyncReport(weight_version=step + 1, seconds=0.055, tensors=310, bytes=1_192_000_000),
        mismatch=make_mismatch(),
        evaluation=make_evaluation(step) if evaluated else None,
    )


def make_run(steps: int = 40) -> TrainReport:
    evaluations = tuple(make_evaluation(s, 0.15 + 0.7 * s / steps) for s in range(0, steps, 10))
    return TrainReport(
        steps=tuple(make_step(step) for step in range(steps)),
        evaluations=evaluations,
        seconds=112.0,
        history=tuple(make_metrics(step) for step in range(steps)),
    )


def make_status(done: int = 20, **changes: object) -> TrainingStatus:
    status = TrainingStatus(
        state="running",
        total=100,
        done=done,
        step=done,
        history=tuple(make_metrics(step) for step in range(done)),
        last=make_step(done - 1) if done else None,
        step_seconds=0.26,
    )
    return replace(status, **changes)  # type: ignore[arg-type]


def make_state(**changes: object) -> SessionState:
    state = SessionState(
        name="tiny", state="running", model="tiny", parameters=826_000, device="cpu",
        dtype="float32", step=3, planned=60, weight_version=3, engine_version=3, last_reward=0.5,
        rewards=(0.25, 0.5, 0.75), next_calls=(("session.sync()", "hand over"),),
    )  # fmt: skip
    return replace(state, **changes)  # type: ignore[arg-type]


def make_memory_plan(
    gib: float = 24,
    *,
    kv_sleeps: bool = True,
    deep: bool = False,
    offloaded: bool = False,
    name: str = "a card of 24 GiB",
    **changes: object,
) -> MemoryPlan:
    """For a model of 0.6 B parameters. `deep`: weights sleep as well, and the trainer."""
    resident, kv = (0.0 if offloaded else 6.7), (0.0 if kv_sleeps else 13.0)
    beside = [("engine: process", 0.5), ("trainer: process", 0.5)]
    awake = [("engine: weights", 1.1), ("engine: graphs, workspace", 1.2)]
    asleep = [
        ("engine: weights", 0.0 if deep else 1.1),
        ("engine: KV cache", kv),
        ("engine: graphs, workspace", 0.4 if kv_sleeps else 1.2),
    ]
    held = ("trainer: weights, optimizer", resident)
    generate = [
        ("engine: KV cache", 13.0),
        ("trainer: weights, optimizer", 0 if deep else resident),
    ]
    working = [
        ("trainer: gradients, weights to compute with", 3.3),
        ("trainer: activations, logits", 9.1),
    ]
    plan = MemoryPlan(
        card=Card(name, int(gib * 2**30), is_gpu=True),
        limit=int(gib * 2**30),
        phases=(
            _phase("generate", beside + awake + generate),
            _phase("update", [*beside, *asleep, held, *working]),
            _phase(
                "sync", [*beside, *asleep[1:], awake[0], held, ("trainer: buckets of weights", 1)]
            ),
        ),
        kv_tokens=121_400,
        rollout_tokens=128 * 1536,
        sample_tokens=1536,
        max_tokens_per_gpu=8192,
        recompute="none",
        compile=True,
        optimizer_cpu_offload=offloaded,
        kv_sleeps=kv_sleeps,
        engine_weights_sleep=deep,
        trainer_sleeps=deep,
    )
    return replace(plan, **changes)  # type: ignore[arg-type]


def _phase(name: PhaseName, parts: Sequence[tuple[str, float]]) -> Phase:
    """From GiB."""
    return Phase(name, tuple((what, int(size * 2**30)) for what, size in parts))


def make_host_plan() -> MemoryPlan:
    """For the tiny model on a laptop without a GPU."""
    engine = [("engine: process", 0.0), ("engine: weights", 0.003), ("engine: KV cache", 0.125)]
    trainer = [("trainer: process", 0.0), ("trainer: weights, optimizer", 0.01)]
    working = [
        ("trainer: gradients, weights to compute with", 0.007),
        ("trainer: activations, logits", 1.3),
    ]
    return make_memory_plan(
        16,
        kv_sleeps=False,
        card=Card("host memory", 16 * 2**30, is_gpu=False),
        phases=(
            _phase("generate", engine + trainer),
            _phase("update", engine + trainer + working),
            _phase("sync", [*engine, *trainer, ("trainer: buckets of weights", 0.003)]),
        ),
        kv_tokens=128 * 512,
        rollout_tokens=128 * 512,
        sample_tokens=512,
        compile=False,
    )


def make_batch() -> Batch:
    rollout = make_rollout()
    advantages = []
    for group in rollout.groups():
        rewards = [s.reward or 0.0 for s in group]
        mean = sum(rewards) / len(rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
        advantages += [(r - mean) / (spread + 1e-6) for r in rewards]
    return Batch(
        samples=rollout.samples,
        advantages=tuple(advantages),
        step=3,
        left_out=("prompt 12: the reward failed on 1 of 8 samples",),
    )
