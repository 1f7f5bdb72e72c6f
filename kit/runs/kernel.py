"""Execute a notebook in a kernel of the running interpreter, by papermill."""

from __future__ import annotations

import logging
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
    from nbclient.exceptions import DeadKernelError
    from nbconvert.filters import strip_ansi
    from papermill.exceptions import PapermillExecutionError

    target = target.resolve()
    log = target.parent / KERNEL_LOG
    with log.open("wb") as output:
        manager = _manager(target.parent, output, settings)
        try:
            _run_cells(source, target, parameters, on_cell, directory, manager)
        except PapermillExecutionError as error:
            trace = strip_ansi("\n".join(error.traceback))
            return WhatFailed(
                name=error.ename,
                message=str(error.evalue),
                cell=error.exec_count,
                traceback=trace,
            )
        except DeadKernelError:
            return WhatFailed(
                name="DeadKernelError",
                message="The kernel's process ended by itself, as it does when memory runs out. "
                f"If it wrote anything last, that is in {KERNEL_LOG}.",
            )
        finally:
            if not log.stat().st_size:
                log.unlink()
    return None


def _run_cells(
    source: Path,
    target: Path,
    parameters: Mapping[str, Any],
    on_cell: Callable[[str], None],
    directory: Path,
    manager: Any,
) -> None:
    import papermill

    def started(cell: Any, **_: Any) -> None:
        if cell.cell_type == "code":
            manager.busy = bool(cell.source.strip())
            on_cell(cell.source)

    def ended(**_: Any) -> None:
        manager.busy = False

    logging.getLogger("papermill").setLevel(logging.ERROR)
    papermill.iorw.papermill_io.register(str(target), _WholeFile())
    papermill.execute_notebook(
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
