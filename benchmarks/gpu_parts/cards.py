"""Sessions of their own: a small card, learning in earnest, and memory run out on purpose."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.gpu_parts.card import device_memory, memory_by_process
from benchmarks.gpu_parts.children import Report
from benchmarks.gpu_parts.session import phases_of, stack_of
from benchmarks.gpu_parts.workload import Workload, reward
from kit import RLSession
from kit.errors import KitError
from kit.samples import Rollout
from kit.tiny import tasks
from kit.tracking.run_folder import METRICS, read_rows

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "10_qwen3_gsm8k.ipynb"


@contextmanager
def small_host(work: Workload, report: Report) -> Iterator[RLSession]:
    """A running session within `memory.device_gib`."""
    config = work.config(
        memory={"device_gib": work.small_card_gib},
        rollout={"max_response_len": work.small_card_response},
    ).replace("training.rollout_batch_size", work.small_card_prompts)
    report.say("starting a session on a small card")
    session = RLSession.start(config, data=work.rows(), reward=reward)
    try:
        yield session
    finally:
        session.close()


def small_card(session: RLSession, work: Workload, report: Report) -> None:
    """Steps within `memory.device_gib`: seconds of each, and the device's memory after each."""
    report.put("gib", work.small_card_gib)
    report.put("samples", session.config.training.rollout_size)
    report.put("start_seconds", session.start_seconds)
    report.put("plan", str(session.memory_plan()))
    report.say(f"started in {session.start_seconds:.1f} s")
    seconds: list[float] = []
    taken: list[int | None] = []
    holders: list[dict[str, int]] = []
    for number in range(1, 1 + work.small_card_steps):
        begin = time.perf_counter()
        metrics = session.step().metrics
        seconds.append(time.perf_counter() - begin)
        taken.append(device_memory())
        report.put("steps", seconds)
        holders.append(memory_by_process() | reserved(session))
        report.put("device_memory", taken)
        report.put("holders", holders)
        report.put("last", {k: v for k, v in metrics.items() if k.startswith("perf/")})
        report.say(f"step {number}: {seconds[-1]:.2f} s, device memory {taken[-1]}")
        report.put("phases", phases_of(session))
        if report.left() < 1.5 * seconds[-1]:
            report.say("no time for more")
            break


def reserved(session: RLSession) -> dict[str, int]:
    """Bytes that torch holds of the card in the trainer's process; the rest of it is CUDA's own."""
    looks = stack_of(session).trainers.ask("device_memory")
    return {f"torch in trainer {i}": look["held"] for i, look in enumerate(looks) if look}


def learning(_: None, work: Workload, report: Report) -> None:
    """The notebook for GSM8K, run as a batch run, with the embedded model and sums in GSM8K's form:
    held-out accuracy before and after, and how far the log-probs part at each step.
    """
    from kit.runs import run_notebook

    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        values = {
            "model": "tiny",
            "data": _sums(folder / "train.jsonl", "train"),
            "eval_data": _sums(folder / "held_out.jsonl", "held_out"),
            "system_prompt": "",
            "device": work.device,
            "steps": work.learning_steps,
            "prompts": 16,
            "response_tokens": 8,
            "learning_rate": 1e-4,
            "save": False,
        }
        report.put("parameters", values | {"data": "sums", "eval_data": "sums"})
        run = run_notebook(NOTEBOOK, values, out_root=folder / "runs")
        if run.error:
            raise RuntimeError(run.error.traceback)
        rows = read_rows(run.folder / METRICS)
        report.put("seconds", run.seconds)
        report.put("before", run.headline["accuracy_before"])
        report.put("after", run.headline["accuracy_after"])
        report.put("rewards", [row["rollout/raw_reward"] for row in rows])
        report.put("differences", [row["train/train_rollout_logprob_abs_diff"] for row in rows])
        report.say(f"{len(rows)} steps, the notebook in {run.seconds:.1f} s")


def _sums(file: Path, split: str) -> str:
    """The embedded model's additions, as rows like those of GSM8K."""
    rows = (
        {"question": row["prompt"], "answer": f"It is {row['label']}.\n#### {row['label']}"}
        for row in tasks.rows("addition", split)
    )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def out_of_memory(session: RLSession, work: Workload, report: Report) -> None:
    """An update that cannot fit, what the error says, and an update that can."""
    rollout = session.score(session.generate())
    begin = time.perf_counter()
    try:
        session.update(session.advantages(_too_long(rollout, work.too_long)))
        report.put("error", "")
    except KitError as error:
        report.put("error", f"{type(error).__name__}: {error}")
        report.say(str(error))
    report.say(f"the update that is too large: {time.perf_counter() - begin:.1f} s")
    report.put("applied_after", session.update(session.advantages(rollout)).applied)


def _too_long(rollout: Rollout, tokens: int) -> Rollout:
    """Two of its samples, made so long that they cannot be trained on."""
    longer = []
    for sample in rollout.groups()[0][:2]:
        times = -(-tokens // sample.response_length)
        longer.append(
            replace(
                sample,
                tokens=[*sample.prompt_tokens, *sample.response_tokens * times],
                response_length=sample.response_length * times,
                rollout_log_probs=list(sample.rollout_log_probs or []) * times,
                version_lengths=[],
                metadata={},
            )
        )
    return Rollout(longer, rollout.step, rollout.seconds)
