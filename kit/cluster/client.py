"""`Cluster`: the client's side of a stack's Ray head.

It starts the head or takes one that lives, connects this process to it, and ends it or leaves it.

Ray has no public way for some of what a driver in a notebook needs. All that the kit takes from
Ray's private modules stands in `head.py` (for a head of our own) and at the end of this file, read
from Ray 2.60.0:

    ray_constants.ENABLE_RAY_CLUSTER, Config.initialize,
    AuthenticationTokenLoader.reset_cache                 read once, at the import of Ray
    worker.print_to_stdstream                             prints the news of dead actors
    worker.shutdown, worker.global_worker, state.state    what a forked child must leave alone
    worker._global_node.get_session_dir_path              where a cluster keeps its logs
    ray.init(_node_ip_address=...)                        keeps the loopback address
    state.actors, ActorHandle._actor_id                   the state of one actor
    services.read_ray_address, utils.get_ray_temp_dir     what `ray start` has left
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import psutil

from kit.cluster import fork_server, lease, processes, progress, registry
from kit.cluster.folder import stacks_root
from kit.cluster.lease import Connection
from kit.cluster.placement import Layout, Placement
from kit.cluster.processes import Elsewhere
from kit.cluster.registry import Entry
from kit.errors import KitError, SessionError, StackError
from kit.utils import forks, pids
from kit.utils.files import working_folder
from kit.utils.hardware import GIB
from kit.utils.imports import import_ray
from kit.utils.interrupts import held
from kit.utils.reading import UnreadableError, read_end
from kit.utils.shadowing import hidden

PACKAGE_ROOT = Path(__file__).resolve().parents[2]
CPU_OPERATORS = PACKAGE_ROOT / "kit" / "engine" / "cpu" / "site"
LEFT_OUT = Path(__file__).with_name("site")
CLIENT_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's way to say "this machine only": it then keeps the loopback address it is given.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Else what uses Ray after its end starts another one, in silence: see also `connect_ray`.
    "RAY_ENABLE_AUTO_CONNECT": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray has to find in the environment of every process that talks to the head."""

OURS = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
"""Environment variables that a session sets; the user's values are restored after it."""

RAYS_OWN = ("gcs_server", "raylet")
"""Ray's two processes, by the names of their programs."""

GCS_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""How long Ray looks for its control service before it ends the process: a notebook's kernel."""
GCS_SECONDS = 600
"""Instead of a minute, in which a busy machine may not get to leave Ray. Not without end: Ray
looks for it as well when an exception ends a script."""
LOG_LINES = 20
"""Lines of each log in an error message."""
RAYLET_TROUBLE = re.compile(r"\[[\d :,-]+ [EFC] ")
"""How a line of the raylet's log begins that tells of an error: date, time, severity."""
MEMORY_FULL = re.compile(r"memory usage above threshold, used: (\d+),.* total bytes: (\d+)")
"""In the raylet's log, before it kills: bytes that all of the machine's processes use, and all."""
KILLED = re.compile(r"Selected to kill: .*task name=(\w+)")
"""And whom it killed: `trainer` or `engine`, before its number."""


class Cluster:
    """Client of a Ray head that the kit started, behind a fresh token; drives it while it lives."""

    entry: Entry
    """What the registry knows of it; there from `register` on."""
    _connected = _was_connected = False

    def __init__(self, device: str, gpus: int = 0) -> None:
        """Start the head in the background; `connect` waits for it."""
        self.stack = secrets.token_hex(8)
        works_in = working_folder()
        # Only its owner may read it.
        self.directory = Path(tempfile.mkdtemp(prefix="kit-", dir=stacks_root()))
        self._token = secrets.token_hex(32)
        self._before: dict[str, str | None] = {}
        try:
            self._start_head(device, gpus, works_in)
        except BaseException:
            shutil.rmtree(self.directory, ignore_errors=True)
            raise

    def _start_head(self, device: str, gpus: int, works_in: str) -> None:
        (self.directory / "tmp").mkdir()
        # In this order: a folder with a log and no open socket is taken for one that was left.
        with lease.listen(self.directory) as listener:
            log = (self.directory / "head.log").open("wb")
            # Said before the head can hear it, so that it ends if we do before that.
            self._control = Connection(self.directory)
            self._control.tell("own", folder=works_in)
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
        """Command-line arguments of the head, after its directory and its socket."""
        return [device, str(gpus)]

    @classmethod
    def taken(cls, entry: Entry) -> Self:
        """Drive a running cluster of this kind; see `joined.take_cluster`.

        Raises:
            StackError: somebody drives it, or it has ended.
        """
        cluster = cls.__new__(cls)
        cluster.stack, cluster.directory = entry.stack, entry.folder
        cluster._token, cluster.entry = entry.token, entry
        cluster._before = {}
        cluster._control = lease.own(entry.folder)
        cluster._control.tell("ask")  # `connect` reads one answer
        cluster._head = psutil.Process(entry.head)
        return cluster

    def register(self, name: str, device: str, **more: Any) -> None:
        """Enter it in the registry; others cannot take it before it is `ready`."""
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
        registry.write_identity(self.entry)

    def rename(self, name: str, **changed: Any) -> None:
        """Register it for another session, which is not `ready` before it has started."""
        self.entry = replace(self.entry, name=name, fingerprint="", **changed)
        registry.write(self.entry)

    def ready(self, lease: float, **changed: Any) -> None:
        """Register it as started.

        Args:
            lease: seconds that it outlives this process, should that end without a word.
            changed: fields of the entry that are new.
        """
        self.entry = replace(self.entry, **changed)
        registry.write(self.entry)
        self._control.ask("lease", seconds=lease)

    def ends_with_us(self) -> None:
        """End with this process, should that be killed before it has ended the stack."""
        with contextlib.suppress(OSError, ValueError):
            self._control.ask("lease", seconds=0.0)

    def _environment(self, device: str) -> dict[str, str]:
        env = os.environ | CLIENT_SETTINGS
        # Compiled modules kept from the last start save a third of this one.
        env.pop("PYTHONDONTWRITEBYTECODE", None)
        env.pop("PYTHONOPTIMIZE", None)  # Ray's and SGLang's code needs its docstrings
        if device == "cpu":
            env[fork_server.SOCKET_ENV] = str(self.directory / "zygote")
        return env | {
            **actors_environment(device, self.stack, self.directory),
            "RAY_AUTH_TOKEN": self._token,
            "TMPDIR": str(self.directory / "tmp"),
            "RAY_enable_worker_prestart": "0",
            # Else a driver waits for workers in Ray's code, where nothing can interrupt it; and for
            # ever, where a busy machine does not start them within the time below.
            "RAY_prestart_worker_first_driver": "0",
            # Half a minute by default, after which the raylet ends: too short for a busy machine.
            "RAY_agent_register_timeout_ms": "600000",
            "RAY_worker_register_timeout_seconds": "3600",
            "RAY_enable_metrics_collection": "0",
        }

    def connect(self, timeout: float) -> None:
        """Wait for the head and join it. Raises StackError after `timeout` seconds."""
        address = self._await_address(timeout)
        self._control.heard()
        with held():  # joined by half, Ray could be neither used nor left
            self._join(address)

    def _join(self, address: str) -> None:
        """Connect to the head with its own token."""
        self._before = {key: os.environ.get(key) for key in OURS}
        os.environ.update(CLIENT_SETTINGS)
        os.environ["RAY_AUTH_TOKEN"] = self._token
        connect_ray(address, "kit", joins=False, _node_ip_address="127.0.0.1")
        self._connected = self._was_connected = True

    def _refused(self) -> KitError | None:
        """Error that the head process has left, if it ended on purpose."""
        return None

    def _await_address(self, timeout: float) -> str:
        file = self.directory / "address"
        deadline = time.monotonic() + timeout
        while not file.exists():
            if pids.started(self._head.pid) is None:
                raise self._refused() or StackError(
                    "Ray's head ended while starting.",
                    why=self.log_tail(),
                    fix=_hint()
                    or f"free memory and space in {self.directory.parent}, and start again.",
                )
            if time.monotonic() > deadline:
                raise StackError(
                    f"Ray's head was not up after {timeout:.0f} s.",
                    why=self.log_tail(),
                    fix="raise engine.start_timeout, or free the machine's cores.",
                )
            time.sleep(0.02)
        return file.read_text()

    def log_tail(self) -> str:
        """Last lines of the stack's own logs, for error messages."""
        text = []
        for name in ("head.log", "zygote.log"):
            text += self._lines(name)[-LOG_LINES:]
        # The raylet also says much that is no trouble.
        raylet = self._lines("ray/session_latest/logs/raylet.out")
        text += [line for line in raylet if RAYLET_TROUBLE.match(line)][-LOG_LINES:]
        return "\n".join([*text, *self._last_traceback()])

    def killed_for_memory(self, part: str) -> str:
        """What Ray's log says of a `trainer` or `engine` that it killed; else empty."""
        return killed_for_memory(self._lines("ray/session_latest/logs/raylet.out"), part)

    def _last_traceback(self) -> list[str]:
        """End of the last traceback in the logs of Ray's workers.

        On a GPU SGLang's processes write there, and end those that could tell of it.
        """
        logs = self.directory / "ray" / "session_latest" / "logs"
        newest = sorted(logs.glob("worker-*.err"), key=lambda file: file.stat().st_mtime)
        for file in reversed(newest):
            try:
                _, found, text = read_end(file).rpartition("Traceback (most recent call last)")
            except (OSError, UnreadableError):
                continue
            if found:
                return text.splitlines()[1:][-LOG_LINES:]
        return []

    def _lines(self, name: str) -> list[str]:
        try:
            return read_end(self.directory / name).splitlines()
        except (OSError, UnreadableError):
            return []

    def host_memory(self) -> int:
        """Bytes that the stack's processes hold, without shared memory."""
        return processes.own_memory(self.processes())

    def processes(self) -> list[psutil.Process]:
        """All living processes of the stack."""
        return processes.of_stack(self.stack, self._head.pid)

    def head_members(self) -> list[int | Elsewhere]:
        """Processes without which no call can be made: the head, and Ray's two that it started."""
        children = psutil.Process(self._head.pid).children()
        return [self._head.pid, *(p.pid for p in children if p.name() in RAYS_OWN)]

    def placement(self, layout: Layout, device: str) -> Placement:
        """Placement of actors; available after `connect`."""
        return Placement(layout, device, self.directory)

    def leave(self, seconds: float, *, warm: bool) -> None:
        """Detach from it; it ends if no client takes it.

        Args:
            seconds: until it ends.
            warm: whether the next start may take it and reset it.
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
        """Restore the user's environment variables, such as a token for another cluster."""
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


def _hint() -> str:
    """What to do about files that hide modules of Python, where there are any."""
    found = hidden(standard_library=True)
    names = ", ".join(str(path) for path in found.values())
    return f"rename what hides modules of Python or packages: {names}." if names else ""


def actors_environment(device: str, stack: str, directory: Path) -> dict[str, str]:
    """Environment variables of the engines and trainers of a stack."""
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
    """Cache folders of compiled kernels, kept from one start to the next."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kit" / "kernels"
    return {
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        # SGLang sets the one from the other.
        "DG_JIT_CACHE_DIR": str(cache / "deep_gemm"),
        "SGLANG_DG_CACHE_DIR": str(cache / "deep_gemm"),
    }


def _joined(*paths: str) -> str:
    return os.pathsep.join(path for path in paths if path)


# ---- Ray's private names -------------------------------------------------------------------------


def connect_ray(address: str, namespace: str, *, joins: bool, **options: Any) -> None:
    """Connect this process to a Ray cluster, even if Ray was imported with other settings.

    Args:
        address: of its control service.
        namespace: of the names of actors.
        joins: whether others run the cluster, on addresses that need not be this machine's.
        options: of `ray.init`.

    Raises:
        SessionError: this process is connected to one already.
    """
    import_ray()
    import ray
    from ray._private import auto_init_hook, ray_constants, worker
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    if ray.is_initialized():
        raise SessionError(
            "This process is already connected to a Ray cluster.",
            fix="call `ray.shutdown()`, or close the other session, before `RLSession.start`.",
        )
    # Ray reads the environment's word for it as it is imported, which may have been before this. A
    # step under way when its session is closed would look for the head, which is gone, for minutes.
    auto_init_hook.enable_auto_connect = False
    ray_constants.ENABLE_RAY_CLUSTER = joins
    on_terminate = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
    before = os.environ.get(GCS_TIMEOUT)
    os.environ[GCS_TIMEOUT] = str(GCS_SECONDS)
    try:
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()
        ray.init(
            address=address,
            namespace=namespace,
            log_to_driver=False,
            logging_level="ERROR",
            **options,
        )
    finally:
        os.environ.pop(GCS_TIMEOUT)
        if before is not None:
            os.environ[GCS_TIMEOUT] = before
    # A death is told by the verb that misses the actor; Ray would print its own words into
    # whichever cell runs.
    worker.print_to_stdstream = lambda *_, **__: None
    _let_children_end(on_terminate)


_hooks: list[Callable[[], None]] = []
"""What children do that this process forks."""


def _let_children_end(on_terminate: Any) -> None:
    """Have children that this process forks end without Ray, for whose threads they would wait.

    Args:
        on_terminate: what SIGTERM did before Ray took it, which prints where each thread is.
    """
    from ray._private import state, worker
    from ray.experimental import internal_kv

    def forget() -> None:
        atexit.unregister(worker.shutdown)
        worker.global_worker.set_is_connected(False)
        worker.global_worker.mode = None  # else it tells the cluster of an exception that ends it
        forks.never_release(
            worker.global_worker, worker._global_node, state.state, internal_kv.__dict__
        )
        forks.exit_without_destructors()
        signal.signal(signal.SIGTERM, on_terminate)

    if not _hooks:
        _hooks.append(forget)
        os.register_at_fork(after_in_child=forget)


def actor_state(actor: Any) -> str:
    """Ray's state of an actor, such as `DEAD`; empty for an unknown actor."""
    from ray._private.state import actors

    return str(actors(actor._actor_id.hex()).get("State", ""))


def session_directory() -> Path:
    """Directory of the connected cluster's files, the same on each node."""
    import ray

    return Path(ray._private.worker._global_node.get_session_dir_path())


def local_cluster() -> str | None:
    """Address of the cluster that `ray start` has started on this machine."""
    from ray._private import services, utils

    address: str | None = services.read_ray_address(utils.get_ray_temp_dir())
    return address


def killed_for_memory(raylet: Iterable[str], part: str) -> str:
    """What a raylet's log says of the last `trainer` or `engine` that it killed for memory.

    Ray does so when the processes of a machine, whoever's they are, use nearly all of its memory.
    """
    used, told = (0, 0), ""
    for line in raylet:
        if found := MEMORY_FULL.search(line):
            used = int(found[1]), int(found[2])
        elif (found := KILLED.search(line)) and found[1] == part:
            told = (
                f"Ray killed it for memory: {used[0] / GIB:.1f} of the machine's "
                f"{used[1] / GIB:.1f} GiB were in use, by all processes together."
            )
    return told
