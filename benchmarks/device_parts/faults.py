"""What has to hold beside speed: a killed rank is told, a checkpoint goes on with another number of
ranks, and a sweep runs a member on each device.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.device_parts.measure import GRADIENT, first_rollout
from benchmarks.device_parts.task import Task
from benchmarks.gpu_parts.workload import reward
from kit import RLSession
from kit.cluster.processes import TRAINER, cores
from kit.errors import KitError
from kit.samples import Batch

if TYPE_CHECKING:
    from benchmarks.device_parts.worker import Report

HELD_OUT = 16
"""Prompts whose log-probs are compared before and after: none of them is trained on."""
LAST_BREATH = 10.0
"""Seconds that the other ranks get to be gone too."""
SAME = {"float32": 1e-5, "bfloat16": 2e-2}
"""Largest mean difference of log-probs of the same weights, by dtype: micro-batches differ."""


def faults(task: Task, report: Report) -> None:
    """Save with all ranks, kill one of them in an update, load with half as many."""
    work = task.workload()
    inputs: dict[str, Any] = {"data": work.rows(), "reward": reward}
    path = Path(task.folder) / "checkpoint"
    with RLSession.start(task.config(), **inputs) as session:
        report.say(f"started: {session.debug.stack.layout.in_words()}")
        batch = session.advantages(first_rollout(session, task, report))
        update = session.update(batch)
        begin = time.perf_counter()
        session.save(path)
        report.put("save_s", time.perf_counter() - begin)
        prompts = [f"{row['prompt'][::-1]}" for row in work.rows()[-HELD_OUT:]]
        held_out = session.generate(prompts, n_samples_per_prompt=1)
        before, sums = session.log_probs(held_out), weights(session)
        report.say("saved; killing a rank in an update")
        report.put("killed", killed_rank(session, batch, update.seconds))
        report.say(f"told: {report.measured['killed']['error']}")
    ranks = max(1, task.row.devices // 2)
    begin = time.perf_counter()
    changes = {"engine.replicas": ranks}
    with RLSession.load(path, changes=changes, num_trainers=ranks, **inputs) as session:
        report.put("load_s", time.perf_counter() - begin)
        report.put("loaded", session.debug.stack.layout.in_words())
        found = difference(before, session.log_probs(held_out))
        same = found["mean"] <= SAME[session.debug.stack.dtype]
        after = weights(session)
        equal = sum(after.get(name) == value for name, value in sums.items())
        report.put("held_out", {**found, "same": same})
        report.put("weights", {"equal": equal, "of": len(sums)})
        norm = session.step().metrics[GRADIENT]
        report.put("went_on", {"gradient": norm, "finite": math.isfinite(norm)})
        report.say(f"went on with {session.debug.stack.layout.in_words()}")


def killed_rank(session: RLSession, batch: Batch, seconds: float) -> dict[str, Any]:
    """Kill the last rank in the middle of an update; which error tells of it, and how soon."""
    stack, killed = session.debug.stack, [0.0]
    victim = psutil.Process(stack.trainers.ask("processes")[-1][0])
    members = stack.watch.members(TRAINER)

    def kill() -> None:
        killed[0] = time.perf_counter()
        victim.kill()

    timer = threading.Timer(0.4 * seconds, kill)
    timer.start()
    error = updates_until_an_error(session, batch)
    told = time.perf_counter() - killed[0]
    timer.join()
    psutil.wait_procs(members, timeout=LAST_BREATH)
    return {
        "error": type(error).__name__,
        "message": str(error),
        "told_s": round(told, 2),
        "names_a_way_out": "RLSession.load" in str(error),
        "ranks_left": sum(process.is_running() for process in members),
    }


def updates_until_an_error(session: RLSession, batch: Batch) -> KitError:
    """Train on, whatever was killed meanwhile. Raises RuntimeError where nobody tells."""
    for number in range(1000):
        try:
            session.update(replace(batch, id=f"again {number}"))
        except KitError as error:
            return error
    raise RuntimeError("a thousand updates were made, and no error told of the rank's death")


def weights(session: RLSession) -> dict[str, Any]:
    """A checksum of each whole parameter, whatever number of ranks holds its parts."""
    found: dict[str, Any] = session.debug.stack.probe("checksums")
    return found


def difference(before: list[list[float]], after: list[list[float]]) -> dict[str, float]:
    """Mean and largest difference of log-probs, token by token."""
    pairs = (zip(one, other, strict=True) for one, other in zip(before, after, strict=True))
    each = [abs(a - b) for tokens in pairs for a, b in tokens]
    return {"mean": sum(each) / len(each), "largest": max(each)}


# ---- a sweep -----------------------------------------------------------------------------------

PARAMETERS = """\
member: int = 0  # number of the member
steps: int = 3  # training steps
notes: str = ""  # folder for what each member says of itself
"""
TRAINS = """\
import json, pathlib, time
from kit import RLSession, SessionConfig
from kit.utils.hardware import gpu_uuids

begin = time.time()
session = RLSession.start(SessionConfig.preset("tiny").replace("seed", member))
started = time.time()
session.train(steps, show=False)
said = {
    "device": (gpu_uuids(1) or [""])[0],
    "begin": begin, "started": started, "end": time.time(), "steps": session.step_count,
}
pathlib.Path(notes, f"{member}.json").write_text(json.dumps(said))
session.close()
"""


def sweep(task: Task, report: Report) -> None:
    """`kit sweep` with as many members as devices: who ran where, and whether at the same time."""
    folder, count = Path(task.folder), task.row.devices
    notes = folder / "notes"
    notes.mkdir(exist_ok=True)
    for old in notes.glob("*.json"):
        old.unlink()
    notebook = write_notebook(folder / "sweep.ipynb")
    numbers = ",".join(map(str, range(count)))
    command = [sys.executable, "-m", "kit", "sweep", str(notebook), "--out", str(folder / "runs")]
    command += ["-p", "member", numbers, "-p", "steps", str(task.steps), "-p", "notes", str(notes)]
    # On a CPU a member keeps at least one core busy: with fewer cores they take turns.
    at_once = count if task.device == "cuda" else min(count, cores())
    command += ["--parallel", str(at_once)]
    begin = time.perf_counter()
    done = subprocess.run(command, check=False)
    report.put("seconds", time.perf_counter() - begin)
    said = [json.loads(file.read_text("utf-8")) for file in sorted(notes.glob("*.json"))]
    report.put("sweep", {"members": count, **together(said)})
    if done.returncode:
        raise RuntimeError(f"kit sweep ended with exit code {done.returncode}")


def together(said: list[dict[str, Any]]) -> dict[str, Any]:
    """How many members came to their end, on how many GPUs, and for how long all ran at once.

    Args:
        said: what each member said of itself.
    """
    overlap = min((s["end"] for s in said), default=0) - max((s["begin"] for s in said), default=0)
    return {
        "completed": len(said),
        "gpus": len({s["device"] for s in said} - {""}),
        "overlap_s": round(max(overlap, 0.0), 1),
    }


def write_notebook(file: Path) -> Path:
    """A notebook that trains the embedded model and says where and when it did."""
    import nbformat

    cells = [nbformat.v4.new_code_cell(PARAMETERS), nbformat.v4.new_code_cell(TRAINS)]
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, file)
    return file
