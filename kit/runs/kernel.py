"""Execute a notebook in a kernel of the running interpreter, by papermill."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

from kit.reports.runs import SETTINGS_VARIABLE, RunSettings, WhatFailed
from kit.tracking.recorder import RUN_DIR_VARIABLE
from kit.utils.files import replace_file
from kit.utils.reading import read_text

KERNEL_LOG = "kernel.log"
"""What the kernel's process and its children wrote outside of the notebook's cells."""

OUTPUT_SECONDS = 600
"""How long outputs may take to arrive after a cell's end: many megabytes, or a busy machine."""

END_EXTENSION = "kit.runs.kernel_extension"

SHUTDOWN_SECONDS = 40.0
"""How long a kernel may take to close its session before it is killed. Half of it passes before
it is asked a second time (SIGTERM), so that must be enough to end engine and trainer."""


def execute(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[str], None],
    directory: Path,
    settings: RunSettings,
) -> WhatFailed | None:
    """Run `source` from top to bottom and keep `target` up to date while it runs.

    The kernel is that of the running interpreter, whatever kernels are installed for the user. It
    finds the run's folder and settings in its environment. However this ends, the kernel has ended
    too.

    Args:
        source: the notebook.
        target: where the executed copy goes; its folder is the run's.
        parameters: values for the notebook's parameters, checked already.
        on_cell: called with a code cell's source before it runs.
        directory: where the kernel works: the notebook's own folder, as in JupyterLab.
        settings: what sessions in the kernel are told.

    Returns:
        What went wrong, if anything did.
    """
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from nbconvert.filters import strip_ansi
    from papermill.exceptions import PapermillExecutionError

    target = target.resolve()
    log = target.parent / KERNEL_LOG
    with log.open("wb") as output:
        manager = _manager(target.parent, output, settings)
        try:
            ran = _run_cells(source, target, parameters, on_cell, directory, manager)
            return _cut_off(ran)
        except PapermillExecutionError as error:
            trace = strip_ansi("\n".join(error.traceback))
            return WhatFailed(
                name=error.ename,
                message=str(error.evalue),
                cell=error.exec_count,
                traceback=trace,
            )
        except CellTimeoutError:
            return WhatFailed(
                name="CellTimeoutError",
                message=f"What the cell put out had not arrived {OUTPUT_SECONDS} seconds after its "
                "end. Print less, or write it into a file.",
                cell=manager.cell,
            )
        except DeadKernelError:
            return WhatFailed(
                name="DeadKernelError",
                message=f"{_death(manager.exit_code)} If it wrote anything last, that is in "
                f"{KERNEL_LOG}.",
                cell=manager.cell or None,
            )
        finally:
            if not log.stat().st_size:
                log.unlink()


def _cut_off(ran: Any) -> WhatFailed | None:
    """What ended a notebook before its end without a failure in Papermill's eyes: `sys.exit(0)`."""
    from nbconvert.filters import strip_ansi

    cells = [cell for cell in ran.cells if cell.cell_type == "code" and cell.source.strip()]
    for number, cell in enumerate(cells, start=1):
        allowed = "raises-exception" in cell.metadata.get("tags", [])
        exits = [o for o in cell.outputs if o.output_type == "error" and o.ename == "SystemExit"]
        if allowed or not exits:
            continue
        left = len(cells) - number
        after = (
            f"; {left} code {'cell' if left == 1 else 'cells'} after it did not run" if left else ""
        )
        return WhatFailed(
            name="SystemExit",
            message=f"the cell ended the notebook with sys.exit({exits[0].evalue}){after}.",
            cell=number,
            traceback=strip_ansi("\n".join(exits[0].traceback)),
        )
    return None


def _death(exit_code: int | None) -> str:
    """Sentence on how the kernel's process ended."""
    if exit_code is None:
        return "The kernel's process ended by itself, as it does when memory runs out."
    if exit_code >= 0:
        return (
            f"The kernel's process ended with exit code {exit_code}, as it does where code calls "
            f"os._exit({exit_code})."
        )
    try:
        name = signal.Signals(-exit_code).name
    except ValueError:
        name = f"signal {-exit_code}"
    memory = ", as it is when memory runs out" if exit_code == -signal.SIGKILL else ""
    return f"The kernel's process was ended by {name}{memory}."


def _run_cells(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[str], None],
    directory: Path,
    manager: Any,
) -> Any:
    """Execute all cells; returns the executed notebook."""
    import papermill

    def started(cell: Any, **_: Any) -> None:
        if cell.cell_type == "code":
            manager.busy = bool(cell.source.strip())
            manager.cell += manager.busy
            on_cell(cell.source)

    def ended(**_: Any) -> None:
        manager.busy = False

    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill.iorw.papermill_io.register(str(target), _WholeFile())
    return papermill.execute_notebook(
        _literal(source.resolve()),
        _literal(target),
        parameters=dict(parameters),
        kernel_name="python3",
        language="python",
        progress_bar=False,
        cwd=directory,
        kernel_manager_class=manager,
        on_cell_start=started,
        on_cell_executed=ended,
        start_timeout=120,
        iopub_timeout=OUTPUT_SECONDS,
    )


class _WholeFile:
    """Papermill's way to write the executed notebook, so that no reader ever sees half of it."""

    def read(self, path: str) -> str:
        return read_text(path)

    def listdir(self, path: str) -> list[str]:
        return [str(file) for file in Path(path).iterdir()]

    def write(self, text: str, path: str) -> None:
        replace_file(Path(path), text)

    def pretty_path(self, path: str) -> str:
        return path


def _literal(path: Path) -> str:
    """Escape braces in a path, which Papermill would read as a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _manager(folder: Path, output: IO[bytes], settings: RunSettings) -> Any:
    """A kernel manager whose kernel is this interpreter and belongs to the run in `folder`."""
    from ipykernel.kernelspec import get_kernel_dict
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Float, default

    spec = KernelSpec(**get_kernel_dict())
    spec.argv[0] = sys.executable
    spec.argv.append(f"--IPKernelApp.extra_extensions={END_EXTENSION}")
    told = {RUN_DIR_VARIABLE: str(folder), SETTINGS_VARIABLE: settings.model_dump_json()}
    spec.env = {name: value.replace("$", "$$") for name, value in told.items()}

    class RunKernelManager(AsyncKernelManager):
        shutdown_wait_time = Float(SHUTDOWN_SECONDS)
        busy = False
        """Whether a cell is being executed."""
        cell = 0
        """Number of the code cell that was begun last; empty ones are not counted."""
        exit_code: int | None = None
        """Of a kernel that ended by itself; negative for a signal."""

        async def _async_is_alive(self) -> bool:
            alive = await super()._async_is_alive()
            process = getattr(self.provisioner, "process", None)
            if not alive and process is not None:
                RunKernelManager.exit_code = process.poll()
            return bool(alive)

        is_alive = _async_is_alive

        @default("transport_encryption")
        def _encrypt(self) -> str:
            """Encrypt cells and outputs: other users could listen on the loopback ports."""
            return "auto"

        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

        async def _async_start_kernel(self, **options: Any) -> None:
            await super()._async_start_kernel(**options | {"stdout": output, "stderr": output})

        start_kernel = _async_start_kernel

        async def _async_interrupt_kernel(self) -> None:
            """Interrupt only a busy kernel; an idle one that is ended would complain."""
            if self.busy:
                await super()._async_interrupt_kernel()

        interrupt_kernel = _async_interrupt_kernel

    return RunKernelManager
