"""The settings of an engine and of one call, and how SGLang is told of them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from kit.config import EngineConfig, QuantizationConfig
from kit.engine import families
from kit.engine.adapters import AdapterSettings
from kit.engine.drafts.settings import SpeculativeSettings
from kit.engine.patches import sglang_sources
from kit.errors import ConfigError, StackError, did_you_mean
from kit.memory.sizes import MOST_GRAPHS
from kit.messages import SamplingSettings
from kit.models.source import ExpertLayout

QUANTIZED = "kit"
"""SGLang's name for the quantisation that `kit.engine.quantization` registers."""
HANDLED_ELSEWHERE = {
    "replicas": "kit.cluster.placement",
    "max_running_requests": "EngineSettings.max_running_requests, one replica's share",
    "max_total_tokens": "EngineSettings.max_total_tokens, decided by the memory plan",
    "lora": "EngineSettings.adapters",
    "max_loras_per_batch": "EngineSettings.adapters",
    "speculative": "EngineSettings.speculative",
    "update_weight_buffer_size": "kit.weight_sync.sender",
    "quantization": "EngineSettings.quantization",
    "weight_bits": "kit.weight_sync.transform",
    "weight_noise": "kit.weight_sync.transform",
    "start_timeout": "kit.stack",
    "call_timeout": "kit.stack",
    "health_interval": "kit.cluster.processes",
}
"""Settings of `EngineConfig` that `server_arguments` does not read, and who does."""


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """The settings of one engine: the section `engine` whole, and what was decided beside it."""

    config: EngineConfig
    model_path: str
    device: str
    dtype: str
    context_length: int
    max_running_requests: int
    seed: int
    max_total_tokens: int | None = None
    saves_memory: bool = False
    """Whether it can let go of its memory while the trainer works; GPU only."""
    needs_tokenizer: bool = False
    """Only stop strings do: prompts and responses travel as token ids."""
    threads: int = 1
    """On a CPU: cores that its arithmetic takes."""
    trust_remote_code: bool = False
    cards: str = ""
    """GPUs that it may use, in the form of CUDA_VISIBLE_DEVICES; empty leaves it as it is."""
    joined: bool = False
    """Whether it runs on a cluster that the session has joined, and not on a head of its own."""
    shares_operators: bool = False
    """Whether it computes with the trainer's operators, for `training.true_on_policy`."""
    experts: ExpertLayout | None = None
    """The model's experts, where the engine is to report which of them each token took."""
    adapters: AdapterSettings | None = None
    """Adapters that it has beside its weights; None where a sync merges them, or there are none."""
    quantization: QuantizationConfig | None = None
    """How its linear layers are quantised, alone or as the trainer's."""
    speculative: SpeculativeSettings | None = None
    """How it drafts; None writes one token after the other."""

    @property
    def identity(self) -> dict[str, Any]:
        """What a running engine cannot change, as plain values."""
        config = self.config.model_dump(exclude=set(HANDLED_ELSEWHERE))
        fixed = asdict(self) | {"config": config}
        del fixed["seed"]  # each request brings its own
        return fixed


def generation_request(
    prompts: list[list[int]],
    sampling: SamplingSettings,
    seeds: list[int],
    limits: list[int],
    *,
    experts: bool = False,
    adapters: list[str] | None = None,
) -> dict[str, Any]:
    """The arguments of SGLang's `async_generate`; a seed and a limit of new tokens a prompt.

    `adapters` are SGLang's names of those that write, one a prompt; None has no adapter write.
    """
    common: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        # Where it streams, it is to tell of whole responses, not of every token.
        "stream_interval": max(limits, default=0) + 2,
    }
    if sampling.stop_token_ids:
        common["stop_token_ids"] = list(sampling.stop_token_ids)
    if sampling.stop:
        common |= {"stop": list(sampling.stop), "no_stop_trim": True}
    return {
        "input_ids": prompts,
        "sampling_params": [
            common | {"sampling_seed": seed, "max_new_tokens": limit}
            for seed, limit in zip(seeds, limits, strict=True)
        ],
        "return_logprob": True,
        "lora_path": adapters,
        "return_routed_experts": experts,
    }


def server_arguments(settings: EngineSettings) -> dict[str, Any]:
    """The fields of `sglang.ServerArgs` that an engine is started with."""
    config = settings.config
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
        "kv_cache_dtype": config.kv_cache_dtype,
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
            # The plan says how large the KV cache is; this only has to leave room for it.
            "mem_fraction_static": config.mem_fraction_static or 0.95,
            # Graphs of the prefill take minutes to compile and save little in long generations.
            "disable_prefill_cuda_graph": True,
            # By default as few as 24 on a small card, which has room for more of a small model.
            "cuda_graph_max_bs_decode": min(settings.max_running_requests, MOST_GRAPHS),
            "enable_memory_saver": settings.saves_memory,
            "tp_size": config.tensor_parallel,
        }
        if config.data_parallel > 1:
            # The only form of it in which SGLang takes new weights.
            arguments |= {"dp_size": config.data_parallel, "enable_dp_attention": True}
    arguments |= families.server_arguments(settings.model_path, settings.device)
    if settings.quantization:
        arguments["quantization"] = QUANTIZED
    if settings.adapters:
        arguments |= settings.adapters.server_arguments(settings.device)
    if settings.speculative:
        arguments |= settings.speculative.server_arguments(sleeps=settings.saves_memory)
    if settings.experts:
        arguments["enable_return_routed_experts"] = True
    if (settings.experts or settings.shares_operators) and settings.device == "cuda":
        # Others compute experts without recording them, and lay their weights out anew.
        arguments["moe_runner_backend"] = "triton"
    if settings.shares_operators and settings.device == "cuda":
        arguments["attention_backend"] = _shared_attention(settings)
    elif config.attention_backend != "auto":
        arguments["attention_backend"] = config.attention_backend
    return arguments | config.extra


def _shared_attention(settings: EngineSettings) -> str:
    """Name of the attention that the trainer computes with too."""
    from transformers import AutoConfig

    from kit.operators.cuda_attention import attention_of

    config = AutoConfig.from_pretrained(settings.model_path)
    return attention_of(config, settings.config.attention_backend)


def check_extra(extra: dict[str, Any]) -> None:
    """Raise ConfigError for a key that SGLang does not know."""
    known = sglang_settings() if extra else set()
    for key in extra:
        if key not in known:
            raise ConfigError(
                f"engine.extra has {key!r}, which SGLang does not know.",
                fix=did_you_mean(key, known),
            )


def check_attention(config: EngineConfig, device: str) -> None:
    """Raise ConfigError for an attention of SGLang's own on a CPU."""
    chosen = config.extra.get("attention_backend", config.attention_backend)
    if device == "cpu" and chosen != "auto":
        raise ConfigError(
            f"engine.attention_backend is {chosen!r}, and the engine runs on a CPU.",
            why="There it has the kit's own attention, and with it the kit's changes to SGLang: "
            "checksums of weights, adapters, what families of models need.",
            fix="leave engine.attention_backend out, or run on a GPU.",
        )


def sglang_settings() -> set[str]:
    """The fields of `sglang.ServerArgs`, read from its source."""
    import ast

    source = (sglang_sources() / "server_args.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.ClassDef) and node.name == "ServerArgs":
            fields = [item for item in node.body if isinstance(item, ast.AnnAssign)]
            return {item.target.id for item in fields if isinstance(item.target, ast.Name)}
    raise StackError("This SGLang has no class ServerArgs.", fix="install the pinned version.")
