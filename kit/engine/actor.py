"""`Engine`: SGLang as an asynchronous Ray actor. Several calls run at once; `abort` is one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any

from kit.cluster import processes, progress
from kit.engine import patches, scoring
from kit.engine.server_args import EngineSettings, generation_request, server_arguments
from kit.errors import StackError
from kit.messages import EngineStatus, Generation, Rescored, SamplingSettings
from kit.weight_sync import verify
from kit.weight_sync.transport import BACKENDS, BucketSpec, Handle, ReceiveBuffer, serialize

PATIENCE = 600.0
"""Seconds that new weights wait for responses that are being written."""


Part = tuple[float, list[tuple[int, Generation]]]
"""(seconds from the call to the last of them, responses with their prompt's place in the call)."""


PART_SECONDS = 0.1
"""How often finished responses are handed over: seldom enough to cost the engine nothing."""


class Engine:
    """The engine's side of generating, taking weights, and sleeping."""

    def __init__(self, settings: EngineSettings, weight_version: int = 0) -> None:
        """`weight_version`: `NEVER_HANDED` where the trainer may be further than the files are."""
        self.settings = settings
        if settings.cards:  # before anything asks CUDA
            os.environ["CUDA_VISIBLE_DEVICES"] = settings.cards
        self.weight_version = weight_version
        self._open = asyncio.Event()
        self._open.set()
        """Cleared while weights are taken: calls that come in then wait."""
        self._sglang: Any = None
        self._buffer = ReceiveBuffer()
        self._group = ""
        """In which weights are broadcast; empty outside of one."""
        self._asleep: set[str] = set()
        self._forkers: list[int] = []

    async def start(self) -> dict[str, Any]:
        """Start SGLang and its two processes; returns what the session shows of it."""
        progress.report("engine", "importing SGLang")
        import sglang

        # SGLang's processes meet at a TCP port that answers on every interface; a file does not.
        meeting = os.path.join(tempfile.mkdtemp(prefix="meeting"), "file")
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{meeting}"
        if not any(key.startswith("speculative") for key in self.settings.extra):
            patches.import_only(self.settings.model_path)
        engine_class: Any = sglang.Engine
        if self.settings.device == "cpu":
            from kit.cluster.fork_server import use_zygote

            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks for the host's name
            if not self.settings.joined:
                self._forkers = [use_zygote()]
        if self.settings.device == "cuda" or self.settings.attention_backend == "auto":
            engine_class = patches.engine_class(self.settings.device, self.settings.threads)
        graphs = ", capturing graphs" if self.settings.device == "cuda" else ""
        progress.report("engine", f"loading weights{graphs}")
        try:
            self._sglang = engine_class(**server_arguments(self.settings))
        except (RuntimeError, ValueError, OSError, AssertionError) as error:
            raise StackError(
                "SGLang could not start.",
                why=str(error),
                fix="read the message above; engine.extra and engine.max_total_tokens are the "
                "settings that most often cause this.",
            ) from error
        if self._sglang.server_args.dp_size == 1:  # else they find each other by its name
            # SGLang's processes have it open by now; without a name nothing of it can be left.
            for pid in await self.processes():
                processes.take_names_away(pid)
        if self.settings.joined:  # on another node, where nobody sees them die
            processes.end_with(await self.processes())
        progress.report("engine", progress.READY)
        return await self.info()

    async def is_ready(self) -> bool:
        """Has it been started? One that is starting answers when that has ended."""
        return self._sglang is not None

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
        limits = budgets or [sampling.max_new_tokens] * len(seeds)
        outputs = await self._sglang.async_generate(
            **generation_request(prompts, sampling, seeds, limits)
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
        asked = generation_request(prompts, sampling, seeds, [sampling.max_new_tokens] * len(seeds))
        finished: list[tuple[int, Generation]] = []
        seconds = 0.0

        async def read() -> None:
            nonlocal seconds
            async for output in await self._sglang.async_generate(**asked, stream=True):
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
        return await scoring.rescore(
            self._sglang, tokens, response_lengths, cached=cached, experts=experts
        )

    async def checksums(self) -> dict[str, str]:
        """A checksum of each parameter, under SGLang's names."""
        return await verify.engine_checksums(self._sglang.tokenizer_manager)

    async def receive_weights(
        self,
        version: int,
        *handles: Handle,
        last: bool = True,
        flush_cache: bool = True,
        after: Any = None,
    ) -> tuple[int, int]:
        """Take new weights and forget the cached prefixes of the old ones: (tensors, bytes).

        Nothing is generated from the first bucket to the last.

        Args:
            version: the number of updates that made them.
            handles: where the weights are, for each of the engine's devices.
            last: does no other bucket follow?
            flush_cache: False keeps the prefixes, which no longer fit the weights.
            after: the answer for the bucket before, which Ray has to have first.

        Raises:
            StackError: SGLang refused them.
        """
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput

        await self.pause()
        first = handles[0]
        payloads = [handle.ipc for handle in handles]
        if not first.ipc:
            payloads = [serialize(self._buffer.receive(first), first.entries)]
        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=payloads,
            load_format="flattened_bucket",
            flush_cache=flush_cache and last,
            weight_version=str(version),
        )
        manager = self._sglang.tokenizer_manager
        await self._taken(manager.update_weights_from_tensor(request, None), version, last)
        return len(first.entries), first.size

    async def meet_trainer(
        self, host: str, port: int, name: str, first_rank: int, world: int
    ) -> None:
        """Join the group in which rank 0 sends its weights.

        Args:
            host: where rank 0 listens.
            port: of that address.
            name: the group's.
            first_rank: of this engine's devices in the group.
            world: how many there are in all.

        Raises:
            StackError: it was not to be reached.
        """
        from sglang.srt.managers.io_struct import (
            DestroyWeightsUpdateGroupReqInput,
            InitWeightsUpdateGroupReqInput,
        )

        manager = self._sglang.tokenizer_manager
        if self._group:
            await manager.destroy_weights_update_group(
                DestroyWeightsUpdateGroupReqInput(group_name=self._group)
            )
        success, message = await manager.init_weights_update_group(
            InitWeightsUpdateGroupReqInput(
                master_address=host,
                master_port=port,
                rank_offset=first_rank,
                world_size=world,
                group_name=name,
                backend=BACKENDS[self.settings.device],
            )
        )
        if not success:
            raise StackError("The engine did not reach the trainer.", why=message)
        self._group = name

    async def receive_broadcast(
        self,
        version: int,
        spec: BucketSpec,
        *,
        last: bool = True,
        flush_cache: bool = True,
        after: Any = None,
    ) -> tuple[int, int]:
        """What `receive_weights` does, of weights that rank 0 sends to all engines.

        Args:
            version: the number of updates that made them.
            spec: what will come.
            last: as there.
            flush_cache: as there.
            after: as there.

        Raises:
            StackError: they did not arrive.
        """
        from sglang.srt.managers.io_struct import UpdateWeightsFromDistributedReqInput

        await self.pause()
        request = UpdateWeightsFromDistributedReqInput(
            names=[entry.name for entry in spec.entries],
            dtypes=[entry.dtype for entry in spec.entries],
            shapes=[list(entry.shape) for entry in spec.entries],
            group_name=self._group,
            load_format="flattened_bucket",
            flush_cache=flush_cache and last,
            weight_version=str(version),
        )
        manager = self._sglang.tokenizer_manager
        await self._taken(manager.update_weights_from_distributed(request, None), version, last)
        return len(spec.entries), spec.size

    async def _taken(self, answer: Awaitable[tuple[bool, str]], version: int, last: bool) -> None:
        success, message = await answer
        if not success:
            raise StackError("The engine refused the new weights.", why=message)
        if last:
            self.weight_version = version
            await self.go_on()

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

    async def settle(self) -> EngineStatus:
        """Stop all that a driver asked for who is gone; for the one who takes over."""
        interrupted = not self._open.is_set()
        await self.abort()
        await self.go_on()
        await asyncio.sleep(0)  # what waited for the weights begins now, and is stopped too
        await self.abort()
        return EngineStatus(self.weight_version, interrupted, tuple(sorted(self._asleep)))
