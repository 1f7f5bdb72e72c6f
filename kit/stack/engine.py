"""`Engine`: SGLang as an asynchronous Ray actor. Several calls run at once; `abort` is one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from kit.errors import ConfigError, StackError, did_you_mean
from kit.stack import engine_probes, stages
from kit.stack.engine_probes import Rescored
from kit.stack.standing import EngineStanding
from kit.stack.weights import Handle, Inbox, serialize


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What the engine needs to know."""

    model_path: str
    device: str
    dtype: str
    context_length: int
    max_running_requests: int
    seed: int
    attention_backend: str = "auto"
    max_total_tokens: int | None = None
    mem_fraction_static: float | None = None
    saves_memory: bool = False
    """Can it let go of its memory while the trainer works? GPU only."""
    needs_tokenizer: bool = False
    """Only stop strings do: prompts and responses travel as token ids."""
    threads: int = 1
    """On a CPU: cores that its arithmetic takes."""
    trust_remote_code: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How the tokens of one call are drawn."""

    temperature: float
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Generation:
    """One response as the engine returns it."""

    tokens: list[int]
    log_probs: list[float]
    finish: str
    """`stop`, `length` or `abort`."""
    weight_version: int


PATIENCE = 600.0
"""Seconds that new weights wait for responses that are being written."""
MOST_GRAPHS = 256
"""Largest batch whose decoding is captured as a graph; beyond it launching costs little."""

Part = tuple[float, list[tuple[int, Generation]]]
"""(seconds from the call to the last of them, responses with their prompt's place in the call)."""
PART_SECONDS = 0.1
"""How often finished responses are handed over: seldom enough to cost the engine nothing."""


def _request(
    prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int], limits: list[int]
) -> dict[str, Any]:
    """The arguments of SGLang's `async_generate`; a seed and a limit of new tokens a prompt."""
    common: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # Where it streams, it is to tell of whole responses, not of every token.
        "stream_interval": max(limits, default=0) + 2,
    }
    if sampling.stop:
        common |= {"stop": list(sampling.stop), "no_stop_trim": True}
    return {
        "input_ids": prompts,
        "sampling_params": [
            common | {"sampling_seed": seed, "max_new_tokens": limit}
            for seed, limit in zip(seeds, limits, strict=True)
        ],
        "return_logprob": True,
    }


def server_arguments(settings: EngineSettings) -> dict[str, Any]:
    """`sglang.ServerArgs` fields. Raises ConfigError for an unknown key in `engine.extra`."""
    arguments: dict[str, Any] = {
        "model_path": settings.model_path,
        "device": settings.device,
        "dtype": settings.dtype,
        "context_length": settings.context_length,
        "max_running_requests": settings.max_running_requests,
        "max_total_tokens": settings.max_total_tokens,
        "random_seed": settings.seed,
        "skip_tokenizer_init": not settings.needs_tokenizer,
        "skip_server_warmup": True,
        # Without it the scheduler keeps a core busy while the trainer or nobody works.
        "sleep_on_idle": True,
        "trust_remote_code": settings.trust_remote_code,
        "sampling_backend": "pytorch",
        "log_level": "error",
    }
    if settings.device == "cpu":
        arguments |= {
            "attention_backend": "torch_native",
            # Every sync forgets the cached prefixes, and short prompts are computed faster than
            # they are looked up.
            "disable_radix_cache": True,
            "disable_overlap_schedule": True,
            "grammar_backend": "none",
        }
    else:
        arguments |= {
            "attention_backend": "triton",
            "mem_fraction_static": settings.mem_fraction_static,
            # Graphs of the prefill take minutes to compile and save little in long generations.
            "disable_prefill_cuda_graph": True,
            # By default as few as 24 on a small card, which has room for more of a small model.
            "cuda_graph_max_bs_decode": min(settings.max_running_requests, MOST_GRAPHS),
            "enable_memory_saver": settings.saves_memory,
        }
    if settings.attention_backend != "auto":
        arguments["attention_backend"] = settings.attention_backend
    return arguments | settings.extra


def check_extra(extra: dict[str, Any]) -> None:
    """Raise ConfigError for a key that SGLang does not know."""
    known = sglang_settings() if extra else set()
    for key in extra:
        if key not in known:
            raise ConfigError(
                f"engine.extra has {key!r}, which SGLang does not know.",
                fix=did_you_mean(key, known),
            )


def sglang_settings() -> set[str]:
    """The fields of `sglang.ServerArgs`, read from its source: importing it takes ten seconds."""
    import ast
    from importlib.util import find_spec
    from pathlib import Path

    package = find_spec("sglang")
    assert package is not None
    assert package.submodule_search_locations
    source = Path(package.submodule_search_locations[0]) / "srt" / "server_args.py"
    for node in ast.parse(source.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs":
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return {item.target.id for item in fields if isinstance(item.target, ast.Name)}
    raise StackError("This SGLang has no class ServerArgs.", fix="install the pinned version.")


def run_scheduler(threads: int, *args: Any, **kwargs: Any) -> None:
    """SGLang's scheduler process on a CPU, with what the kit does differently in place."""
    import torch
    from sglang.srt.managers.scheduler import run_scheduler_process

    from kit.stack.cpu import attention, capture, checksums, operators, sampling

    torch.set_num_threads(threads)
    for part in (attention, capture, checksums, operators, sampling):
        part.register()
    run_scheduler_process(*args, **kwargs)


class Engine:
    """The engine's side of generating, taking weights, and sleeping."""

    def __init__(self, settings: EngineSettings) -> None:
        self.settings = settings
        self.weight_version = 0
        self._open = asyncio.Event()
        self._open.set()
        """Cleared while weights are taken: calls that come in then wait."""
        self._sglang: Any = None
        self._inbox = Inbox()
        self._asleep: set[str] = set()
        self._forkers: list[int] = []

    async def start(self) -> dict[str, Any]:
        """Start SGLang and its two processes; returns what the session shows of it."""
        stages.report("engine", "importing SGLang")
        import sglang

        # SGLang's processes meet at a TCP port that answers on every interface; a file does not.
        meeting = os.path.join(tempfile.mkdtemp(prefix="meeting"), "file")
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{meeting}"
        engine_class: Any = sglang.Engine
        if self.settings.device == "cpu":
            from sglang.srt.entrypoints.engine import Engine as SglangEngine

            from kit.stack.cpu.forks import use_zygote

            self._forkers = [use_zygote()]

            class CpuEngine(SglangEngine):
                run_scheduler_process_func = partial(run_scheduler, self.settings.threads)

            if self.settings.attention_backend == "auto":
                engine_class = CpuEngine
        graphs = ", capturing graphs" if self.settings.device == "cuda" else ""
        stages.report("engine", f"loading weights{graphs}")
        try:
            self._sglang = engine_class(**server_arguments(self.settings))
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise StackError(
                "SGLang could not start.",
                why=str(error),
                fix="read the message above; engine.extra and engine.max_total_tokens are the "
                "settings that most often cause this.",
            ) from error
        stages.report("engine", stages.READY)
        return await self.info()

    async def info(self) -> dict[str, Any]:
        """What the session shows of it."""
        info = self._sglang._scheduler_init_result.scheduler_infos[0]
        return {"max_total_tokens": info.get("max_total_num_tokens")}

    async def generate(
        self,
        prompts: list[list[int]],
        sampling: SamplingSettings,
        seeds: list[int],
        budgets: list[int] | None = None,
    ) -> list[Generation]:
        """One response to each prompt, in order. Aborted ones keep the tokens they have.

        Args:
            prompts: token ids.
            sampling: the same for all.
            seeds: one a prompt; the same seed, prompt and weights give the same response, whatever
                else is generated beside it (CPU engine).
            budgets: the most new tokens of each prompt, where they differ; None takes
                `sampling.max_new_tokens` for all.
        """
        await self._open.wait()
        outputs = await self._sglang.async_generate(
            **_request(prompts, sampling, seeds, budgets or [sampling.max_new_tokens] * len(seeds))
        )
        return [self._generation(output) for output in outputs]

    async def generate_in_parts(
        self, prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int]
    ) -> AsyncIterator[Part]:
        """What `generate` returns, but every `PART_SECONDS` what was finished in the meantime.

        SGLang gets the prompts as from `generate`, all at once, so that it works as it does there.
        """
        await self._open.wait()
        begin = time.perf_counter()
        request = _request(prompts, sampling, seeds, [sampling.max_new_tokens] * len(seeds))
        finished: list[tuple[int, Generation]] = []
        seconds = 0.0

        async def read() -> None:
            nonlocal seconds
            async for output in await self._sglang.async_generate(**request, stream=True):
                reason = output["meta_info"]["finish_reason"]
                if reason and reason.get("status_code"):  # raised, where nothing is streamed
                    raise StackError("The engine refused a prompt.", why=reason["message"])
                if reason:
                    finished.append((output["index"], self._generation(output)))
                    seconds = time.perf_counter() - begin

        reading = asyncio.create_task(read())
        while finished or not reading.done():
            await asyncio.wait([reading], timeout=PART_SECONDS)
            if finished:
                part, finished = finished, []  # it may grow while the part is handed over
                yield seconds, part
        await reading

    def _generation(self, output: dict[str, Any]) -> Generation:
        meta = output["meta_info"]
        pairs = meta.get("output_token_logprobs") or []
        return Generation(
            tokens=[pair[1] for pair in pairs],
            log_probs=[pair[0] for pair in pairs],
            finish=(meta.get("finish_reason") or {"type": "abort"})["type"],
            weight_version=self.weight_version,
        )

    async def abort(self) -> None:
        """Stop all running requests; each returns what it has. Waits until none is left.

        Said once it is not enough: of a large batch, requests reach SGLang after the word.
        """
        manager = self._sglang.tokenizer_manager
        deadline = time.monotonic() + PATIENCE
        while manager.rid_to_state and time.monotonic() < deadline:
            manager.abort_request(abort_all=True)
            await asyncio.sleep(0.02)

    async def processes(self) -> list[int]:
        """Ids of those without which it cannot work: its own, SGLang's, and what forked them."""
        watchdog = self._sglang.tokenizer_manager._subprocess_watchdog
        found = [os.getpid(), *(process.pid for process in watchdog._processes)]
        return [*found, *self._forkers]

    async def unanswered(self) -> int:
        """How many requests are being written or wait for it."""
        return len(self._sglang.tokenizer_manager.rid_to_state)

    async def rescore(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        *,
        cached: bool,
        experts: bool = False,
    ) -> list[Rescored]:
        """Log-probs of responses that are there already, at temperature 1; see `engine_probes`."""
        await self._open.wait()
        return await engine_probes.rescore(
            self._sglang, tokens, response_lengths, cached=cached, experts=experts
        )

    async def checksums(self) -> dict[str, str]:
        """A checksum of each parameter, under SGLang's names; see `engine_probes`."""
        return await engine_probes.checksums(self._sglang)

    async def receive_weights(
        self,
        handle: Handle,
        version: int,
        *,
        last: bool = True,
        flush_cache: bool = True,
        after: Any = None,
    ) -> tuple[int, int]:
        """Take new weights and forget the cached prefixes of the old ones: (tensors, bytes).

        Nothing is generated from the first bucket to the last.

        Args:
            handle: where the weights are.
            version: the number of updates that made them.
            last: does no other bucket follow?
            flush_cache: False keeps the prefixes, which no longer fit the weights.
            after: the answer for the bucket before, which Ray has to have first.

        Raises:
            StackError: SGLang refused them.
        """
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        await self.pause()
        payload = handle.ipc or serialize(self._inbox.receive(handle), handle.entries)
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[payload],
            load_format="flattened_bucket",
            flush_cache=flush_cache and last,
            weight_version=str(version),
        )
        success, message = await self._sglang.tokenizer_manager.update_weights_from_tensor(
            request, None
        )
        if not success:
            raise StackError("The engine refused the new weights.", why=message)
        if last:
            self.weight_version = version
            await self.go_on()
        return len(handle.entries), handle.size

    async def pause(self) -> None:
        """Begin nothing new until `go_on`, and wait for what is being written to end.

        SGLang could hold it instead; but then one response would be of two models, and SGLang takes
        tens of milliseconds to hold and to go on.

        Raises:
            StackError: it did not end.
        """
        self._open.clear()
        running = self._sglang.tokenizer_manager.rid_to_state
        deadline = time.monotonic() + PATIENCE
        while running:
            if time.monotonic() > deadline:
                self._open.set()
                raise StackError(
                    f"The engine is still writing {len(running)} responses, so it cannot take new "
                    "weights.",
                    fix="wait for them, or stop them (interrupt the cell that generates).",
                )
            await asyncio.sleep(0.005)

    async def go_on(self) -> None:
        """End a pause, if there is one."""
        self._open.set()

    async def sleep(self, tags: list[str]) -> None:
        """Free device memory: `kv_cache`, `cuda_graph`, `weights`. Nothing may be running."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._sglang.tokenizer_manager.release_memory_occupation(
            ReleaseMemoryOccupationReqInput(tags=tags), None
        )
        self._asleep |= set(tags)

    async def wake(self, tags: list[str]) -> None:
        """Take it again; weights are as they were, the KV cache is empty."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        await self._sglang.tokenizer_manager.resume_memory_occupation(
            ResumeMemoryOccupationReqInput(tags=tags), None
        )
        self._asleep -= set(tags)

    async def settle(self) -> EngineStanding:
        """Stop all that a driver asked for who is gone; for the one who takes over."""
        interrupted = not self._open.is_set()
        await self.abort()
        await self.go_on()
        await asyncio.sleep(0)  # what waited for the weights begins now, and is stopped too
        await self.abort()
        return EngineStanding(self.weight_version, interrupted, tuple(sorted(self._asleep)))

    async def alive(self) -> bool:
        """Is SGLang's scheduler still running?"""
        return await asyncio.to_thread(self._scheduler_alive)

    def _scheduler_alive(self) -> bool:
        watchdog = self._sglang.tokenizer_manager._subprocess_watchdog
        return all(process.is_alive() for process in watchdog._processes)
