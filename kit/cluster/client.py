"""`Cluster`: the client's side of the stack's Ray head. Starts it or takes one that lives, connects
to it, and ends it or leaves it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import psutil

from kit.cluster import fork_server, lease, processes, progress, registry
from kit.cluster.lease import Connection
from kit.cluster.placement import JoinedPlacement, OwnPlacement
from kit.cluster.processes import Elsewhere
from kit.cluster.registry import Entry
from kit.errors import KitError, SessionError, StackError
from kit.utils import pids
from kit.utils.imports import import_ray
from kit.utils.interrupts import held

if TYPE_CHECKING:
    from kit.stack.stack import Stack


PACKAGE_ROOT = Path(__file__).resolve().parents[2]


CPU_OPERATORS = PACKAGE_ROOT / "kit" / "engine" / "cpu" / "site"


LEFT_OUT = Path(__file__).with_name("site")


CLIENT_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's way to say "this machine only": it then keeps the loopback address it is given.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Else what uses Ray after its end starts another one, in silence.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray has to find in the environment of every process that talks to the head."""


OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
"""Of these, what the user had before a session is there again after it."""


RAYS_OWN = ("gcs_server", "raylet")
"""Its two processes, by the names that their programs have."""


RAYLET_TROUBLE = re.compile(r"\[[\d :,-]+ [EFC] ")
"""How a line of the raylet's log begins that tells of an error: date, time, severity."""


class Cluster:
    """One Ray head of our own, behind a fresh token. This process drives it while it lives."""

    entry: Entry
    """What the registry tells of it; there from `register` on."""

    def __init__(self, device: str, gpus: int = 0) -> None:
        """Start the head in the background; `connect` waits for it."""
        self.stack = secrets.token_hex(8)
        self.directory = Path(tempfile.mkdtemp(prefix="kit-"))  # only its owner may read it
        (self.directory / "tmp").mkdir()
        self._token = secrets.token_hex(32)
        self._before: dict[str, str | None] = {}
        self._connected = self._was_connected = False
        log = (self.directory / "head.log").open("wb")
        with lease.listen(self.directory) as listener:
            # Said before the head can hear it, so that it ends if we do before that.
            self._control = Connection(self.directory)
            self._control.tell("own", folder=os.getcwd())
            command = ["kit.cluster.head", str(self.directory), str(listener.fileno())]
            self._head: psutil.Process = psutil.Popen(
                [sys.executable, "-m", *command, *self._arguments(device, gpus)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment(device),
                cwd=self.directory,
                start_new_session=True,  # Jupyter signals the kernel's whole process group
                pass_fds=[listener.fileno()],
            )
        log.close()

    def _arguments(self, device: str, gpus: int) -> list[str]:
        """What the first process is told, after its directory and its socket."""
        return [device, str(gpus)]

    @classmethod
    def taken(cls, entry: Entry) -> Self:
        """One that lives already and that nobody drives; from now on we do.

        Raises:
            StackError: somebody drives it, or it has ended.
        """
        from kit.cluster.joined import JoinedCluster

        kind: Any = JoinedCluster if entry.address else cls
        cluster: Self = kind.__new__(kind)
        cluster.stack, cluster.directory = entry.stack, entry.folder
        cluster._token, cluster.entry = entry.token, entry
        cluster._before = {}
        cluster._connected = cluster._was_connected = False
        cluster._control = lease.own(entry.folder)
        cluster._control.tell("ask")  # `connect` reads one answer
        cluster._head = psutil.Process(entry.head)
        return cluster

    def register(self, name: str, device: str, **more: Any) -> None:
        """Tell the registry of it; it cannot be taken before it is `ready`."""
        self.entry = registry.new(
            self.stack,
            self._head.pid,
            self.directory,
            self._token,
            name=name,
            device=device,
            **more,
        )
        registry.write(self.entry)
        registry.leave_identity(self.entry)

    def rename(self, name: str, **changed: Any) -> None:
        """It is another session's from now on, and not ready before that has begun."""
        self.entry = replace(self.entry, name=name, fingerprint="", **changed)
        registry.write(self.entry)

    def ready(self, lease: float, **changed: Any) -> None:
        """It has started, and outlives us by so many seconds if we go without a word.

        Args:
            lease: seconds.
            changed: fields of the entry that are new.
        """
        self.entry = replace(self.entry, **changed)
        registry.write(self.entry)
        self._control.ask("lease", seconds=lease)

    def ends_with_us(self) -> None:
        """From now on it does not outlive us, should we be killed before we have ended it."""
        with contextlib.suppress(OSError, ValueError):
            self._control.ask("lease", seconds=0.0)

    def _environment(self, device: str) -> dict[str, str]:
        env = os.environ | CLIENT_SETTINGS
        # Compiled modules kept from the last start save a third of this one.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        if device == "cpu":
            env[fork_server.SOCKET_ENV] = str(self.directory / "zygote")
        return env | {
            **actors_environment(device, self.stack, self.directory),
            "RAY_AUTH_TOKEN": self._token,
            "TMPDIR": str(self.directory / "tmp"),
            "RAY_enable_worker_prestart": "0",
            # Half a minute by default, after which the raylet ends: too short for a busy machine.
            "RAY_agent_register_timeout_ms": "600000",
            "RAY_worker_register_timeout_seconds": "600",
            "RAY_enable_metrics_collection": "0",
        }

    def connect(self, timeout: float) -> None:
        """Wait for the head and join it. Raises StackError after `timeout` seconds."""
        address = self._await_address(timeout)
        self._control.heard()
        with held():  # joined by half, Ray could be neither used nor left
            self._join(address)

    def _join(self, address: str) -> None:
        self._before = {key: os.environ.get(key) for key in OURS}
        os.environ.update(CLIENT_SETTINGS)
        os.environ["RAY_AUTH_TOKEN"] = self._token
        import_ray()
        import ray
        from ray._private import ray_constants, worker
        from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

        self._refuse_a_second_connection()
        # Ray may have been imported before, and has read its settings then.
        ray_constants.ENABLE_RAY_CLUSTER = False
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(
            address=address,
            namespace="kit",
            log_to_driver=False,
            logging_level="ERROR",
            _node_ip_address="127.0.0.1",
        )
        self._connected = self._was_connected = True
        # What has died is told by the verb that misses it; Ray would print its own words into
        # whichever cell runs.
        worker.print_to_stdstream = lambda *_, **__: None

    def _refuse_a_second_connection(self) -> None:
        import ray

        if ray.is_initialized():
            raise SessionError(
                "This process is already connected to a Ray cluster.",
                fix="call `ray.shutdown()`, or close the other session, before `RLSession.start`.",
            )

    def _refused(self) -> KitError | None:
        """What the first process has said, where it ended on purpose."""
        return None

    def _await_address(self, timeout: float) -> str:
        file = self.directory / "address"
        deadline = time.monotonic() + timeout
        while not file.exists():
            if pids.started(self._head.pid) is None:
                raise self._refused() or StackError(
                    "Ray's head ended while starting.",
                    why=self.log_tail(),
                    fix="free memory and /tmp space, and start again.",
                )
            if time.monotonic() > deadline:
                raise StackError(
                    f"Ray's head was not up after {timeout:.0f} s.",
                    why=self.log_tail(),
                    fix="raise engine.start_timeout, or free the machine's cores.",
                )
            time.sleep(0.02)
        return file.read_text()

    def log_tail(self, lines: int = 20) -> str:
        """The last lines of the stack's own logs, for error messages."""
        text = []
        for name in ("head.log", "zygote.log"):
            text += self._lines(name)[-lines:]
        # The raylet also says much that is no trouble.
        raylet = self._lines("ray/session_latest/logs/raylet.out")
        text += [line for line in raylet if RAYLET_TROUBLE.match(line)][-lines:]
        return "\n".join(text)

    def _lines(self, name: str) -> list[str]:
        try:
            return (self.directory / name).read_text(errors="replace").splitlines()
        except OSError:
            return []

    def host_memory(self) -> int:
        """Bytes that the stack's processes hold for themselves, without what they share."""
        return processes.own_memory(self.processes())

    def processes(self) -> list[psutil.Process]:
        """Every living process of the stack."""
        return processes.of_stack(self.stack, self._head.pid)

    @property
    def actors_environment(self) -> dict[str, str]:
        """What actors find in their environment; empty where they inherit it."""
        return {}

    def head_members(self) -> list[int | Elsewhere]:
        """Those without whom no call can be made: processes, or what is elsewhere."""
        return [*self.head_processes()]

    def placement(self, stack: Stack) -> OwnPlacement | JoinedPlacement:
        """Where actors run; there once `connect` is done."""
        return OwnPlacement(stack)

    def head_processes(self) -> list[int]:
        """The first process, and Ray's own that it has started."""
        children = psutil.Process(self._head.pid).children()
        return [self._head.pid, *(p.pid for p in children if p.name() in RAYS_OWN)]

    def leave(self, seconds: float, *, warm: bool) -> None:
        """Let go of it. It ends after so many seconds in which nobody takes it.

        Args:
            seconds: until then.
            warm: may the next start take it and begin anew?
        """
        self.disconnect()
        with contextlib.suppress(OSError):
            self._control.ask("leave", seconds=seconds, warm=warm)
        self._control.close()
        self._restore_environment()
        # Whoever has started the head has to take note of its end, or it stays as a zombie.
        threading.Thread(target=self._head.wait, name="kit-left-stack", daemon=True).start()

    def close(self) -> None:
        """End every process of the stack and remove its directory. Safe to call again."""
        if self._was_connected:
            self.disconnect()
            with contextlib.suppress(OSError, ValueError):
                self._control.ask("end")
        else:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._head.kill()  # still starting: there is nothing that it could end in order
        self._control.close()
        with contextlib.suppress(psutil.NoSuchProcess):
            try:
                self._head.wait(timeout=10)
            except psutil.TimeoutExpired:
                self._head.kill()
                self._head.wait()
        processes.end(processes.of_stack(self.stack, self._head.pid))
        shutil.rmtree(self.directory, ignore_errors=True)
        registry.forget(self.stack)
        self._restore_environment()

    def _restore_environment(self) -> None:
        """A token of the user's own, for another cluster, is there again."""
        for key, value in self._before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value
        self._before = {}

    def disconnect(self) -> None:
        """Leave Ray. Safe to call again."""
        if self._connected:
            import ray

            self._connected = False
            with contextlib.suppress(Exception):
                ray.shutdown()


def actors_environment(device: str, stack: str, directory: Path) -> dict[str, str]:
    """What engines and trainers of a stack have to find in their environment."""
    env = {
        processes.MARK: stack,
        progress.DIRECTORY_ENV: str(directory),
        "PYTHONPATH": _joined(str(LEFT_OUT), str(PACKAGE_ROOT), os.environ.get("PYTHONPATH", "")),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        kept = {key: os.environ.get(key, value) for key, value in kept_kernels().items()}
        return env | {
            **kept,
            # As SGLang sets them for itself: ranks whose NCCL takes memory in different ways wait
            # for each other for ever.
            "NCCL_CUMEM_ENABLE": os.environ.get("NCCL_CUMEM_ENABLE", "0"),
            "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0"),
            # Captured graphs leave the card with the KV cache.
            "SGLANG_MEMORY_SAVER_CUDA_GRAPH": "1",
            # A request that had to make room is read anew with the log-probs of all it had
            # written: 2,048 rows of logits at once, the default, take 4 GiB of the card.
            "SGLANG_LOGPROB_CHUNK_SIZE": "256",
        }
    return env | {
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_ENABLE_TORCH_INFERENCE_MODE": "1",  # less to note for every operation
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": _joined(str(CPU_OPERATORS), env["PYTHONPATH"]),
        # SGLang compiles small functions on first use: seconds each, for a tiny model.
        "TORCHDYNAMO_DISABLE": "1",
        # How long an idle thread spins for its next bit of work, about a millisecond: not at all
        # makes an update half as fast, the default starves a small machine.
        "GOMP_SPINCOUNT": "100000",
        # Keep freed memory: a fresh page for every large tensor makes an update a sixth slower.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # as high as it goes
        "MALLOC_TRIM_THRESHOLD_": str(2 << 30),
    }


def kept_kernels() -> dict[str, str]:
    """Where compiled kernels are kept from one start to the next; the stack's own directories go
    with it.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kit" / "kernels"
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }


def _joined(*paths: str) -> str:
    return os.pathsep.join(path for path in paths if path)
