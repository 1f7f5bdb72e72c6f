"""What a dashboard costs: the same training with and without it, in turns.

    python -m benchmarks.dashboard --steps 10 --pairs 8

A kernel trains blocks of steps in a thread, every other block under a dashboard, and this process
takes the kernel's messages as a front-end would. Printed is the ratio of the median seconds a step:
1.00 costs nothing. On a busy machine the ratio of one pair says little, so all of them are shown.
The drawing thread's own processor time is printed too; that is the part that does not depend on
what else the machine does.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from statistics import median
from typing import Any

from jupyter_client import KernelManager

KERNEL_CODE = """
import json, time
from kit import RLSession
from kit.lifecycle.train_loop import Training, show

def block(session, steps, dashboard):
    training = Training(session.debug, session.step, steps)
    if dashboard:
        show(training)
    begin = time.perf_counter()
    training.resume()
    seconds = [s.metrics["perf/step_time"] for s in training.wait()]
    wall = time.perf_counter() - begin
    drawing = training.shown.drawing_seconds if dashboard else 0.0
    return {"steps": seconds, "wall": wall, "drawing": drawing}

with RLSession.start("tiny") as session:
    session.train(5, show=False)  # the first steps are slower
    for pair in range(%(pairs)d):
        order = (False, True) if pair %% 2 else (True, False)
        row = {dashboard: block(session, %(steps)d, dashboard) for dashboard in order}
        print("PAIR" + json.dumps([row[False], row[True]]), flush=True)
"""


def run(steps: int, pairs: int) -> list[list[dict[str, Any]]]:
    """One row a pair: without the dashboard, with it."""
    rows: list[list[dict[str, Any]]] = []
    manager = KernelManager()
    manager.start_kernel()
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        client.execute(KERNEL_CODE % {"pairs": pairs, "steps": steps}, allow_stdin=True)
        while len(rows) < pairs:
            content = client.get_iopub_msg(timeout=600)["content"]
            if "traceback" in content:
                raise RuntimeError("\n".join(content["traceback"]))
            for line in content.get("text", "").splitlines():
                if line.startswith("PAIR"):
                    rows.append(json.loads(line.removeprefix("PAIR")))
                    print(_words(rows[-1]), flush=True)
        client.get_shell_msg(timeout=120)  # the session has closed by then
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    return rows


def _words(row: list[dict[str, Any]]) -> str:
    without, under = (median(block["steps"]) for block in row)
    drawing = row[1]["drawing"] / row[1]["wall"]
    return (
        f"{without:.3f} s a step without, {under:.3f} s with it: {under / without:.3f}; "
        f"drawing {drawing:.1%}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and print every pair and the whole."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10, help="of one block")
    parser.add_argument("--pairs", type=int, default=8, help="of blocks")
    options = parser.parse_args(argv)
    rows = run(options.steps, options.pairs)
    without, under = ([s for row in rows for s in row[side]["steps"]] for side in (0, 1))
    drawing, wall = (sum(row[1][key] for row in rows) for key in ("drawing", "wall"))
    print(
        f"median of {len(under)} steps each: {median(without):.3f} s without, "
        f"{median(under):.3f} s with the dashboard: ratio {median(under) / median(without):.3f}"
    )
    print(f"drawing took {drawing:.2f} s of processor time in {wall:.1f} s: {drawing / wall:.1%}")


if __name__ == "__main__":
    main()
