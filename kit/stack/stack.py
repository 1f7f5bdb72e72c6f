"""`Stack`: the Ray head, the engine and the trainers of one session, as plain method calls."""

from __future__ import annotations

import ctypes
from typing import Any

from kit.config import SessionConfig
from kit.errors import KitError, StackError
from kit.model.source import ModelSource
from kit.stack.cluster import Cluster


def pick_device(wanted: str) -> str:
    """`cpu` or `cuda`. Raises StackError where CUDA is asked for and there is none."""
    count = gpu_count()
    if wanted == "cuda" and not count:
        raise StackError(
            "device is cuda, but no GPU can be used here.",
            why="The NVIDIA driver (libcuda.so.1) is missing or sees no card.",
            fix="set device: cpu (or auto), or install the driver and check `nvidia-smi`.",
        )
    return "cuda" if wanted == "cuda" or (wanted == "auto" and count) else "cpu"


def gpu_count() -> int:
    """How many GPUs the driver shows to this process; asks the driver, so torch stays unloaded."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


class Stack:
    """Starts in two strokes, so that the caller can do other work while the first one runs."""

    def __init__(self, config: SessionConfig, model: ModelSource, device: str) -> None:
        """Start the head process; returns at once."""
        self.config, self.model, self.device = config, model, device
        self.dtype = config.model.dtype
        if self.dtype == "auto":
            self.dtype = "bfloat16" if device == "cuda" else "float32"
        self.info: dict[str, Any] = {}
        self.cluster = Cluster(device, gpus=gpu_count() if device == "cuda" else 0)
        self._engine: Any = None
        self._trainers: list[Any] = []

    def start(self) -> None:
        """Join the head, start engine and trainers side by side, and wait for them."""
        config = self.config
        self.cluster.connect(config.engine.start_timeout)
        import ray

        from kit.stack.engine import Engine
        from kit.stack.trainer import Trainer

        # On a GPU all of them share the first card; Ray only counts the shares.
        world = config.training.num_trainers
        share = 1.0 / (1 + world) if self.device == "cuda" else 0.0
        options: dict[str, Any] = {"num_cpus": 0, "num_gpus": share, "max_restarts": 0}
        engine = ray.remote(Engine).options(**options, name="engine")
        self._engine = engine.remote(self._engine_settings())
        trainer = ray.remote(Trainer)
        self._trainers = [
            trainer.options(**options, name=f"trainer-{rank}").remote(self._trainer_settings(rank))
            for rank in range(world)
        ]
        starts = [actor.start.remote() for actor in [self._engine, *self._trainers]]
        engine_info, trainer_info, *_ = self._get(starts, "start", config.engine.start_timeout)
        self.info = {**engine_info, **trainer_info, "device": self.device, "dtype": self.dtype}

    def _engine_settings(self) -> Any:
        from kit.stack.engine import EngineSettings

        config, engine = self.config, self.config.engine
        requests = engine.max_running_requests or max(config.rollout_size, 256)
        tokens = engine.max_total_tokens
        if tokens is None and self.device == "cpu":
            tokens = min(requests, 512) * min(self.model.context_length, 1024)
        return EngineSettings(
            model_path=self.model.path,
            device=self.device,
            dtype=self.dtype,
            context_length=self.model.context_length,
            max_running_requests=requests,
            seed=config.seed,
            attention_backend=engine.attention_backend,
            max_total_tokens=tokens,
            mem_fraction_static=engine.mem_fraction_static or 0.4,
            needs_tokenizer=bool(config.rollout.stop),
            trust_remote_code=config.model.trust_remote_code,
            extra=dict(engine.extra),
        )

    def _trainer_settings(self, rank: int) -> Any:
        from kit.stack.trainer import TrainerSettings

        config = self.config
        return TrainerSettings(
            model_path=self.model.path,
            training=config.training,
            temperature=config.rollout.temperature,
            device=self.device,
            dtype=self.dtype,
            seed=config.seed,
            rank=rank,
            rendezvous=str(self.cluster.directory / "tmp" / "rendezvous"),
            trust_remote_code=config.model.trust_remote_code,
            gradient_checkpointing=config.model.gradient_checkpointing,
        )

    def generate(self, prompts: list[list[int]], sampling: Any, seeds: list[int]) -> list[Any]:
        """One `Generation` a prompt."""
        call = self._engine.generate.remote(prompts, sampling, seeds)
        try:
            generations: list[Any] = self._get(call, "generate")
        except KeyboardInterrupt:
            self.abort()  # else the engine would finish it, and the next call wait for that
            raise
        return generations

    def abort(self) -> None:
        """Stop everything that is being generated."""
        self._get(self._engine.abort.remote(), "abort")

    def update(self, batch: Any, update_id: str) -> tuple[list[dict[str, float]], bool]:
        """Optimizer steps on every trainer; (metrics of each step, whether it was done now)."""
        import ray

        shared = ray.put(batch)
        calls = [trainer.update.remote(shared, update_id) for trainer in self._trainers]
        metrics, applied = self._get(calls, "update")[0]
        return metrics, applied

    def log_probs(self, tokens: list[list[int]], response_lengths: list[int]) -> list[list[float]]:
        """The trainer's log-probability of each response token."""
        calls = [t.log_probs.remote(tokens, response_lengths) for t in self._trainers]
        values: list[list[float]] = self._get(calls, "log_probs")[0]
        return values

    def sync(self, version: int) -> tuple[int, int]:
        """Hand the trainer's weights to the engine as `version`: (tensors, bytes)."""
        handles = self._get([t.export_weights.remote() for t in self._trainers], "sync")
        self._get(self._engine.receive_weights.remote(handles[0], version), "sync")
        return len(handles[0].entries), handles[0].size

    def save(self, directory: str) -> None:
        """Have the trainers write weights and optimizer into a directory."""
        self._get([t.save.remote(directory) for t in self._trainers], "save")

    def load(self, directory: str) -> None:
        """Have the trainers read what `save` wrote."""
        self._get([t.load.remote(directory) for t in self._trainers], "load")

    def _get(self, calls: Any, doing: str, timeout: float | None = None) -> Any:
        """Wait for answers. What went wrong in an actor is raised here as if it went wrong here."""
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        limit = timeout or self.config.engine.call_timeout
        try:
            return ray.get(calls, timeout=limit)
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, KitError):
                raise cause from None
            last = str(error).strip().splitlines()
            raise StackError(f"{doing} failed: {last[-1] if last else cause!r}") from error
        except RayActorError as error:
            raise StackError(
                f"A process of the stack died during {doing}.",
                why="\n".join([*str(error).strip().splitlines()[:4], self.cluster.log_tail()]),
                fix="close the session and start it again; if it was killed for memory, lower "
                "engine.max_total_tokens or training.max_tokens_per_gpu.",
            ) from error
        except GetTimeoutError as error:
            setting = "engine.start_timeout" if timeout else "engine.call_timeout"
            raise StackError(
                f"{doing} did not finish within {limit:.0f} s.",
                why=self.cluster.log_tail(),
                fix=f"raise {setting}, or look at what keeps the machine busy.",
            ) from error

    def close(self) -> None:
        """End every process. Safe to call again."""
        self.cluster.close()
