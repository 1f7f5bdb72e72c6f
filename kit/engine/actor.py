"""`Engine`: SGLang as an asynchronous Ray actor. Several calls run at once; `abort` is one."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from kit.cluster import processes, progress
from kit.engine import patches, scoring
from kit.engine.adapters import AdapterLoader
from kit.engine.drafts.passes import Passes
from kit.engine.drafts.settings import DRAFT_OF, DraftLoader, own_of_head
from kit.engine.routing import routed_experts
from kit.engine.server_args import EngineSettings, generation_request, server_arguments
from kit.errors import StackError
from kit.messages import CacheUse, EngineStatus, Generation, Rescored, SamplingSettings
from kit.models import own
from kit.models.source import ExpertLayout
from kit.weight_sync import verify
from kit.weight_sync.receiver import PATIENCE, WeightReceiver
from kit.weight_sync.transport import ADAPTER, DRAFT, POLICY, BucketSpec, Handle

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
        self._sglang: Any = None
        self.weights = WeightReceiver(
            settings.device, lambda: self._sglang.tokenizer_manager, weight_version
        )
        self.adapters = AdapterLoader(settings.adapters) if settings.adapters else None
        """Those that write, where they are not merged into the weights."""
        if self.adapters:
            self.weights.register(ADAPTER, self.adapters)
        if settings.speculative and settings.speculative.has_draft:
            self.weights.register(DRAFT, DraftLoader())
        self._asleep: set[str] = set()
        self._forkers: list[int] = []
        self._experts: ExpertLayout | None = None
        """Those that SGLang reports of each token, where it does."""

    async def start(self) -> dict[str, Any]:
        """Start SGLang and its two processes; returns what the session shows of it."""
        progress.report("engine", "importing SGLang")
        import sglang  # noqa: F401 - here, as it takes seconds

        # SGLang's processes meet at a TCP port that answers on every interface; a file does not.
        meeting = os.path.join(tempfile.mkdtemp(prefix="meeting"), "file")
        os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = f"file://{meeting}"
        if self.settings.config.extra.get("dp_size", 1) == 1:  # else one of them is not ours
            os.environ[patches.LOADS] = os.path.dirname(meeting)
        drafts = self.settings.speculative
        draft = [drafts.draft_path] if drafts and drafts.draft_path else []
        further = [drafts.architecture] if drafts and drafts.architecture else []
        patches.import_only(self.settings.model_path, *draft, further=further)
        own.register(self.settings.model_path)
        if self.settings.device == "cpu":
            from kit.cluster.fork_server import use_zygote

            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else it asks for the host's name
            if not self.settings.joined:
                self._forkers = [use_zygote()]
        engine_class = patches.engine_class(self.settings)
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
        if layout := self.settings.experts:  # which engine.extra may have changed
            config = self._sglang.tokenizer_manager.model_config.hf_text_config
            self._experts = replace(layout, top_k=int(config.num_experts_per_tok))
        if self.settings.joined:  # on another node, where nobody sees them die
            processes.end_with(await self.processes())
        progress.report("engine", progress.READY)
        return await self.info()

    async def is_ready(self) -> bool:
        """Whether it has been started; while it starts, the answer waits for the end."""
        return self._sglang is not None

    async def info(self) -> dict[str, Any]:
        """Facts of the running engine that the session shows."""
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
        await self.weights.wait()
        limits = budgets or [sampling.max_new_tokens] * len(seeds)
        outputs = await self._sglang.async_generate(
            **self._request(prompts, sampling, seeds, limits)
        )
        version = self._version(sampling.adapter)
        return [self._generation(output, version) for output in outputs]

    async def generate_in_parts(
        self, prompts: list[list[int]], sampling: SamplingSettings, seeds: list[int]
    ) -> AsyncIterator[Part]:
        """Yield the responses that `generate` returns, every `PART_SECONDS` those finished since.

        SGLang gets the prompts as from `generate`, all at once, so that it works as it does there.
        """
        await self.weights.wait()
        begin = time.perf_counter()
        limits = [sampling.max_new_tokens] * len(seeds)
        request = self._request(prompts, sampling, seeds, limits)
        version = self._version(sampling.adapter)
        finished: list[tuple[int, Generation]] = []
        seconds = 0.0

        async def read() -> None:
            nonlocal seconds
            async for output in await self._sglang.async_generate(**request, stream=True):
                reason = output["meta_info"]["finish_reason"]
                if reason and reason.get("status_code"):  # raised, where nothing is streamed
                    raise StackError("The engine refused a prompt.", why=reason["message"])
                if reason:
                    finished.append((output["index"], self._generation(output, version)))
                    seconds = time.perf_counter() - begin

        reading = asyncio.create_task(read())
        while finished or not reading.done():
            await asyncio.wait([reading], timeout=PART_SECONDS)
            if finished:
                part, finished = finished, []  # it may grow while the part is handed over
                yield seconds, part
        await reading

    def _request(
        self, prompts: list[list[int]], sampling: SamplingSettings, *of_call: Any
    ) -> dict[str, Any]:
        adapter = self._adapter(sampling.adapter)
        adapters = [adapter] * len(prompts) if adapter else None
        experts = self._experts is not None
        return generation_request(prompts, sampling, *of_call, experts=experts, adapters=adapters)

    def _adapter(self, which: str) -> str | None:
        """SGLang's name for an adapter; None where all that is trained is in the weights."""
        return self.adapters.name_of(which or POLICY) if self.adapters else None

    def _version(self, adapter: str) -> int:
        """Number of the weights that write."""
        if self.adapters:
            return self.adapters.versions.get(adapter or POLICY, self.weights.version)
        return self.weights.version

    def _generation(self, output: dict[str, Any], version: int) -> Generation:
        meta, layout, drafts = output["meta_info"], self._experts, self.settings.speculative
        pairs = meta.get("output_token_logprobs") or []
        passes = Passes.of(meta, len(pairs)) if drafts else None
        return Generation(
            tokens=[pair[1] for pair in pairs],
            log_probs=[pair[0] for pair in pairs],
            finish=(meta.get("finish_reason") or {"type": "abort"})["type"],
            weight_version=version,
            experts=routed_experts(meta, len(pairs), layout) if layout else None,
            spec_info=passes.spec_info(len(pairs)) if passes else None,
            drafted=passes.drafted(len(pairs)) if passes else None,
        )

    async def abort(self) -> None:
        """Stop all running requests; each returns what it has. Waits until none is left.

        Once is not enough: of a large batch, some requests reach SGLang after the abort.
        """
        manager = self._sglang.tokenizer_manager
        deadline = time.monotonic() + PATIENCE
        while manager.rid_to_state and time.monotonic() < deadline:
            manager.abort_request(abort_all=True)
            await asyncio.sleep(0.02)

    async def processes(self) -> list[int]:
        """Ids of the processes it needs: its own, SGLang's, and those that forked them."""
        watchdog = self._sglang.tokenizer_manager._subprocess_watchdog
        sglang = [process.pid for process in watchdog._processes]
        return [os.getpid(), *sglang, *self._forkers]

    async def unanswered(self) -> int:
        """Number of requests that are being written or wait for it."""
        return len(self._sglang.tokenizer_manager.rid_to_state)

    async def rescore(
        self,
        tokens: list[list[int]],
        response_lengths: list[int],
        *,
        cache: CacheUse,
        experts: bool = False,
        adapter: str = "",
    ) -> list[Rescored]:
        """Log-probs of given responses, at temperature 1; see `kit.engine.scoring`."""
        await self.weights.wait()
        layout = self._experts if experts else None
        return await scoring.rescore(
            self._sglang,
            tokens,
            response_lengths,
            cache=cache,
            experts=layout,
            adapter=self._adapter(adapter),
        )

    async def checksums(self, adapter: str = "") -> list[dict[str, str]]:
        """A checksum of each weight by SGLang's names, for each of its devices; of one adapter."""
        manager = self._sglang.tokenizer_manager
        sums = await verify.engine_checksums(manager)
        sums = [{n: one[n] for n in one if not n.startswith(DRAFT_OF)} for one in sums]
        if self.adapters:
            name = f"{verify.ADAPTER_OF}{self._adapter(adapter)}"
            own = await verify.engine_checksums(manager, name)
            sums = [one | other for one, other in zip(sums, own, strict=True)]
        return sums

    async def draft_checksums(self) -> dict[str, str]:
        """A checksum of each weight of its draft; of a head those of its own, by its files' names.

        Others go by SGLang's names. A head's embeddings are the policy's.
        """
        (sums,) = await verify.engine_checksums(self._sglang.tokenizer_manager)
        drafts = self.settings.speculative
        of_draft = (name for name in sums if name.startswith(DRAFT_OF))
        own = {name.removeprefix(DRAFT_OF): sums[name] for name in of_draft}
        return (
            own
            if drafts is None or drafts.is_model
            else own_of_head(own, drafts.architecture, drafts.prefix)
        )

    async def forget_adapter(self, adapter: str | None) -> None:
        """Forget an adapter, if it is there; None forgets all."""
        if self.adapters:
            for name in [*self.adapters.names] if adapter is None else [adapter]:
                await self.adapters.unload(self._sglang.tokenizer_manager, name)

    async def outputs(self, tokens: list[int]) -> dict[str, str]:
        """A digest of what each part of the model puts out as it reads these tokens."""
        await self.weights.wait()
        manager = self._sglang.tokenizer_manager
        await verify.engine_checksums(manager, "record")
        try:
            await scoring.rescore(self._sglang, [tokens], [len(tokens) - 1], cache="none")
        finally:
            (digests,) = await verify.engine_checksums(manager, "recorded")
        return digests

    # ---- weights from trainers -----------------------------------------------------------------

    async def receive_weights(
        self,
        version: int,
        *handles: Handle,
        spec: BucketSpec | None = None,
        after: Any = None,
        **how: Any,
    ) -> tuple[int, int]:
        """Take a bucket of new weights: (tensors, bytes); see `WeightReceiver.receive` for `how`.

        `spec` is what rank 0 sends, where there are no handles; `after` the answer for the bucket
        before, which Ray has to have first.
        """
        return await self.weights.receive(spec or handles[0], version, handles=handles, **how)

    async def meet_trainer(
        self, host: str, port: int, name: str, first_rank: int, world: int
    ) -> None:
        """Join the group in which rank 0 sends its weights; see `WeightReceiver.join_group`."""
        await self.weights.join_group(host, port, name, first_rank, world)

    async def go_on(self) -> None:
        """Generate again after a sync that broke off."""
        self.weights.resume()

    async def sleep(self, tags: list[str]) -> None:
        """Free device memory: `kv_cache`, `cuda_graph`, `weights`. Nothing may be running."""
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        # What has moved already stays: the last such call may have died in another engine.
        if tags := [tag for tag in tags if tag not in self._asleep]:
            request = ReleaseMemoryOccupationReqInput(tags=tags)
            await self._sglang.tokenizer_manager.release_memory_occupation(request, None)
            self._asleep |= set(tags)

    async def wake(self, tags: list[str]) -> None:
        """Take device memory again; weights are as they were, the KV cache is empty."""
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        if tags := [tag for tag in tags if tag in self._asleep]:
            request = ResumeMemoryOccupationReqInput(tags=tags)
            await self._sglang.tokenizer_manager.resume_memory_occupation(request, None)
            self._asleep -= set(tags)

    async def settle(self) -> EngineStatus:
        """Stop all requests of a driver that is gone, for the one that takes over."""
        interrupted = self.weights.receiving
        await self.abort()
        self.weights.resume()
        await asyncio.sleep(0)  # what waited for the weights begins now, and is stopped too
        await self.abort()
        return EngineStatus(self.weights.version, interrupted, tuple(sorted(self._asleep)))
