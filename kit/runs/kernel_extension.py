"""IPython extension that makes the kernels of runs end at once, and at no call of `exit()`; a child
that a cell forks ends with the cell.

ipykernel's main thread closes what outputs pass through while its control thread may still have
to send that it is done with the request to shut down. That thread then waits for ten seconds, or
until the kernel is killed. Here the main thread lets it finish first.
"""

from __future__ import annotations

import atexit
import sys
from typing import Any

from kit.utils.forks import end_with_cell

WAIT_SECONDS = 5.0


def load_ipython_extension(shell: Any) -> None:
    """Called by IPython. Handlers of the notebook run earlier, ipykernel's own later."""
    kernel = shell.kernel
    end_with_cell()
    shell.ask_exit = sys.exit  # of `exit()`: the cell fails, as by `sys.exit()`, and is named

    @atexit.register
    def let_finish() -> None:
        asked_to_shut_down = kernel._shutdown_message is not None
        if asked_to_shut_down and kernel.control_thread is not None:
            kernel.control_thread.join(WAIT_SECONDS)
