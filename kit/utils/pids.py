"""Tell a process from a later one with the same id."""

from __future__ import annotations


def started(pid: int) -> str | None:
    """Identity of a process: the machine's boot and the clock tick of its start since then; None
    where there is no such process.
    """
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The name of the program, in brackets, may itself hold brackets and blanks.
            after = file.read().rpartition(b")")[2].split()
        if after[0] == b"Z":
            return None
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {int(after[19])}"
    except OSError:
        return None
