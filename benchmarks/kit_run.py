"""What `kit run` costs over the same notebook in JupyterLab; and what a warm stack saves.

    python -m benchmarks.kit_run --steps 60 --pairs 3

JupyterLab's side is the notebook's cells executed one after the other in a kernel of this Python,
as Jupyter does it, from the kernel's start to its end. `kit run` is the whole command: parameters
checked, folder, record, samples, page and picture included. Both sides take turns and start their
stack from nothing; printed is the ratio of their medians, 1.00 costs nothing. Then `kit run` is
called twice with `--keep-warm`: the second call finds the first one's stack.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

NOTEBOOK = Path(__file__).parent.parent / "notebooks" / "02_train_to_solve.ipynb"


class ThisPython(AsyncKernelManager):
    """A kernel of the running interpreter, whatever kernels are installed for the user."""

    shutdown_wait_time = 40.0

    @property
    def kernel_spec(self) -> KernelSpec:
        """Its specification."""
        spec = KernelSpec(**get_kernel_dict())
        spec.argv[0] = sys.executable
        return spec


def in_jupyter(notebook: Path, steps: int) -> float:
    """Seconds that the notebook takes in a kernel, from its start to its end."""
    nb: Any = load_notebook_node(str(notebook))
    nb = parameterize_notebook(nb, {"steps": steps}, kernel_name="python3", language="python")
    begin = time.perf_counter()
    client = NotebookClient(
        nb,
        timeout=None,
        startup_timeout=120,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(notebook.parent)}},
    )
    client.execute()
    return time.perf_counter() - begin


def by_kit_run(notebook: Path, steps: int, out: Path, keep_warm: float) -> float:
    """Seconds that the whole command takes."""
    words = [sys.executable, "-m", "kit", "run", str(notebook), "-p", "steps", str(steps)]
    begin = time.perf_counter()
    subprocess.run(
        [*words, "--out", str(out), "--keep-warm", str(keep_warm), "--quiet"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--notebook", type=Path, default=NOTEBOOK)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=3)
    given = parser.parse_args(arguments)
    notebook: Path = given.notebook.resolve()
    jupyter: list[float] = []
    kit: list[float] = []
    with tempfile.TemporaryDirectory() as scratch:
        # Sessions of whoever measures are none of this one's.
        os.environ["XDG_STATE_HOME"] = str(Path(scratch) / "state")
        out = Path(scratch) / "runs"
        for pair in range(given.pairs):
            for side in ("jupyter", "kit") if pair % 2 == 0 else ("kit", "jupyter"):
                if side == "jupyter":
                    jupyter.append(in_jupyter(notebook, given.steps))
                else:
                    kit.append(by_kit_run(notebook, given.steps, out, keep_warm=0))
            print(f"pair {pair + 1}: Jupyter {jupyter[-1]:.1f} s, kit run {kit[-1]:.1f} s")
        ratio = median(kit) / median(jupyter)
        print(f"kit run / Jupyter: {ratio:.2f} (medians of {given.pairs}, {given.steps} steps)")
        first = by_kit_run(notebook, given.steps, out, keep_warm=10)
        second = by_kit_run(notebook, given.steps, out, keep_warm=0.001)
        print(f"kit run, twice: {first:.1f} s, then on the warm stack {second:.1f} s")


if __name__ == "__main__":
    main()
