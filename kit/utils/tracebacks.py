"""Tracebacks of the kit's errors in notebooks: the cell's own lines, without the kit's.

An error of the kit says what happened, why, and what to do; twenty frames of its insides stand
between that and the line that was called. With `KIT_TRACEBACK=full` they are shown.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from kit.errors import KitError

VARIABLE = "KIT_TRACEBACK"
INSIDE = str(Path(__file__).resolve().parents[1]) + os.sep


class WaitingEndedError(KeyboardInterrupt):
    """Somebody interrupted a wait; what was waited for goes on."""


def without_internals(trace: TracebackType | None) -> TracebackType | None:
    """Copy of a traceback without the frames of the kit's own files."""
    kept = []
    while trace is not None:
        if not trace.tb_frame.f_code.co_filename.startswith(INSIDE):
            kept.append(trace)
        trace = trace.tb_next
    copy: TracebackType | None = None
    for one in reversed(kept):
        copy = TracebackType(copy, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return copy


def install() -> None:
    """Have IPython, if this process runs in it, show errors of the kit in this way."""
    ipython = sys.modules.get("IPython")
    shell: Any = ipython.get_ipython() if ipython else None
    if shell is not None and os.environ.get(VARIABLE) != "full":
        shell.set_custom_exc((KitError, WaitingEndedError), _show)


def _show(
    shell: Any, kind: type[BaseException], error: BaseException, trace: Any, tb_offset: Any = None
) -> None:
    if isinstance(error, WaitingEndedError):
        print(error, file=sys.stderr)
        return
    error.__cause__, error.__suppress_context__ = None, True  # its message says what it was
    shell.showtraceback((kind, error, without_internals(trace)), tb_offset=tb_offset)
