"""Who drives a stack, as its head sees it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from kit.cluster import lease

DRIVES_AND_FORKS = """
import os, sys, time
from pathlib import Path
from kit.cluster import lease
connection = lease.own(Path(sys.argv[1]))
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_driver_that_is_killed_is_missed_though_a_child_that_it_forked_lives() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as short:
        directory = Path(short)
        control = lease.Control(lease.listen(directory), lease=600)
        head = threading.Thread(target=control.serve)
        head.start()
        command = [sys.executable, "-c", DRIVES_AND_FORKS, short]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
            assert driver.stdout
            child = int(driver.stdout.readline())
            driver.kill()
        try:
            until = time.monotonic() + 60
            while (lease.state_of(directory) or {})["driver"] and time.monotonic() < until:
                time.sleep(0.01)
            os.kill(child, 0)  # it lives
            connection = lease.own(directory)
            assert (lease.state_of(directory) or {})["driver"] == os.getpid()
            connection.ask("end")
            connection.close()
        finally:
            os.kill(child, signal.SIGKILL)
            head.join(60)
        assert not head.is_alive()
