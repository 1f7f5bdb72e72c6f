"""Checks of settings that depend on each other, and the error that says what to change.

`check_...` runs when a `SessionConfig` is made, before anything starts. `explain` turns pydantic's
validation errors into one ConfigError.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from pydantic import BaseModel, ValidationError

from kit.config.counterparts import counterpart
from kit.errors import ConfigError, did_you_mean
from kit.utils.formatting import shorten

if TYPE_CHECKING:
    from kit.config.sections import (
        ClusterConfig,
        DataConfig,
        EngineConfig,
        ModelConfig,
        RewardConfig,
        RolloutConfig,
    )
    from kit.config.training import TrainingConfig


def check_rollout_policies(rollout: RolloutConfig, training: TrainingConfig) -> None:
    """Raise ValueError for rollout settings that contradict each other or would have no effect."""
    at_once, prompts = rollout.over_sampling_batch_size, training.rollout_batch_size
    if at_once is not None and at_once < prompts:
        raise ValueError(
            f"rollout.over_sampling_batch_size is {at_once}, fewer than the {prompts} prompts of "
            f"training.rollout_batch_size. What to do: give it more than {prompts}, or leave it "
            f"out."
        )
    surplus = at_once is not None and (at_once > prompts or rollout.dynamic_sampling)
    if rollout.partial_rollout and not surplus:
        raise ValueError(
            "rollout.partial_rollout continues what was aborted, and nothing is: "
            f"over_sampling_batch_size is {at_once}. What to do: set "
            f"rollout.over_sampling_batch_size above rollout_batch_size ({prompts}), such as "
            f"{2 * prompts}."
        )
    if rollout.mask_offpolicy_in_partial_rollout and not rollout.partial_rollout:
        raise ValueError(
            "rollout.mask_offpolicy_in_partial_rollout masks what older weights wrote, and without "
            "partial_rollout they write nothing. What to do: set rollout.partial_rollout: true, or "
            "leave the mask out."
        )
    if rollout.dynamic_sampling and training.n_samples_per_prompt == 1:
        raise ValueError(
            "rollout.dynamic_sampling compares the rewards of a group, and "
            "training.n_samples_per_prompt is 1. What to do: set it to 2 or more."
        )


def check_parallel(engine: EngineConfig) -> None:
    """Raise ValueError for parallel sizes that SGLang cannot run, or cannot sync weights with."""
    data, tensor = engine.data_parallel, engine.tensor_parallel
    if data > 1 and tensor == 1:
        raise ValueError(
            f"engine.data_parallel is {data} and engine.tensor_parallel 1: SGLang takes new "
            "weights in several data-parallel copies only where they share the devices of one "
            f"tensor-parallel engine. What to do: for copies side by side set engine.replicas: "
            f"{data}; else set engine.tensor_parallel to a multiple of {data}."
        )
    if tensor % data:
        raise ValueError(
            f"engine.data_parallel {data} does not divide engine.tensor_parallel {tensor}: "
            "attention is divided among the devices of one engine. What to do: take a divisor of "
            f"{tensor}."
        )
    for key, ours in (("tp_size", "tensor_parallel"), ("dp_size", "data_parallel")):
        if key in engine.extra:
            raise ValueError(
                f"engine.extra has {key}, of which the kit has to know. What to do: set "
                f"engine.{ours} instead."
            )


def check_true_on_policy(engine: EngineConfig, training: TrainingConfig) -> None:
    """Raise ValueError for what makes engine and trainer compute differently, where they must not.

    Of SGLang's own settings only those are taken that do not touch what is computed.
    """
    if not training.true_on_policy:
        return
    wrong = {
        "engine.weight_bits": engine.weight_bits is not None,
        "engine.weight_noise": engine.weight_noise > 0,
        "engine.tensor_parallel": engine.tensor_parallel > 1,
        "engine.attention_backend": engine.attention_backend not in ("auto", "fa3", "triton"),
    } | {f"engine.extra.{key}": key not in _NEUTRAL for key in engine.extra}
    found = [name for name, is_wrong in wrong.items() if is_wrong]
    if found:
        raise ValueError(
            f"training.true_on_policy is set, and {found[0]} too: the engine would compute with "
            f"other weights or operators than the trainer. What to do: leave one of them out."
        )


def check_routing_replay(engine: EngineConfig, training: TrainingConfig) -> None:
    """Raise ValueError for settings of SGLang with which its record of experts would be wrong."""
    if not training.use_rollout_routing_replay:
        return
    for name in ("tensor_parallel", "data_parallel"):
        if getattr(engine, name) > 1:
            raise ValueError(
                "training.use_rollout_routing_replay needs the engine's record of experts, and "
                f"with engine.{name} above 1 that was never compared with what is computed. What "
                f"to do: set engine.{name}: 1 and engine.replicas, or take "
                "training.use_routing_replay, which needs no record of the engine's."
            )
    extra, why = engine.extra, ""
    chunk = extra.get("chunked_prefill_size", 1)
    if isinstance(chunk, int) and chunk < 1:
        key, why = "chunked_prefill_size", "the record is as long as a part of a prompt can be"
    elif extra.get("moe_runner_backend", "triton") not in ("auto", "triton"):
        key, why = "moe_runner_backend", "only triton is known to record what it computes"
    elif extra.get("enable_return_routed_experts", True) is not True:
        key, why = "enable_return_routed_experts", "it switches the record off"
    if why:
        raise ValueError(
            f"training.use_rollout_routing_replay needs the engine's record of experts, and "
            f"engine.extra has {key}: {extra[key]!r}; {why}. What to do: leave {key} out, or take "
            "training.use_routing_replay, which needs no record of the engine's."
        )


def check_quantization(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, cluster: ClusterConfig
) -> None:
    """Raise ValueError for settings with which quantisation was never tried."""
    _check_cache(training, engine)
    both, alone = model.quantization, engine.quantization
    if both is None and alone is None:
        return
    name = "model.quantization" if both else "engine.quantization"
    extra = [key for key in engine.extra if key not in _NEUTRAL]
    refused = {
        "engine.quantization is set too, and model.quantization quantises the engine's weights "
        "already": bool(both and alone),
        "model.lora trains adapters, which nothing here quantises with the weights beside them": (
            model.lora is not None
        ),
        "engine.weight_bits and engine.weight_noise round or disturb the same weights": (
            engine.disturbed
        ),
        "engine.speculative has a draft write first, whose layers nothing here quantises": bool(
            engine.speculative
        ),
        "engines of several devices (engine.tensor_parallel, engine.data_parallel) divide a "
        "weight's blocks": engine.tensor_parallel > 1 or engine.data_parallel > 1,
        "engines on devices of their own (cluster.colocate: false) get weights by broadcast, which "
        "was never tried with codes and scales": not cluster.colocate,
        f"engine.extra has {', '.join(extra)}, with which SGLang may compute otherwise": bool(
            extra
        ),
        "training.true_on_policy promises equal bits, and the engine alone would have quantised "
        "weights": bool(alone and training.true_on_policy),
    }
    for why, applies in refused.items():
        if applies:
            raise ValueError(f"{name} is set, and {why}. What to do: leave one of them out.")


def _check_cache(training: TrainingConfig, engine: EngineConfig) -> None:
    """Raise ValueError for what a cache of another dtype than the model's does not go with."""
    if "kv_cache_dtype" in engine.extra:
        raise ValueError(
            "engine.extra has kv_cache_dtype, of which the kit has to know: what it rounds is to "
            "be corrected for, and counted in the memory plan. What to do: set "
            "engine.kv_cache_dtype instead."
        )
    if engine.kv_cache_dtype == "auto":
        return
    refused = {
        "training.true_on_policy promises equal bits, and the engine alone would round keys and "
        "values": training.true_on_policy,
        "engine.speculative keeps a draft's keys and values beside the model's, which was never "
        "tried": engine.speculative is not None,
    }
    for why, applies in refused.items():
        if applies:
            raise ValueError(
                f"engine.kv_cache_dtype is {engine.kv_cache_dtype}, and {why}. What to do: leave "
                "one of them out."
            )


def check_speculative(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, cluster: ClusterConfig
) -> None:
    """Raise ValueError for what drafts are not known to go with."""
    for key in engine.extra:
        if key.startswith("speculative"):
            raise ValueError(
                f"engine.extra has {key}, of which the kit has to know: SGLang would load the "
                "policy's weights into the draft, and on a CPU write as if the temperature were 0. "
                "What to do: set engine.speculative instead."
            )
    drafts = engine.speculative
    if training.draft and not (drafts and drafts.has_weights):
        raise ValueError(
            "training.draft is set, and there is no draft to be trained. What to do: set "
            "engine.speculative: {algorithm: standalone, draft_model: ...}, or eagle, eagle3 or "
            "mtp, or leave it out."
        )
    if drafts is None:
        return
    if training.draft and training.draft.mtp_loss_scaling_factor and drafts.algorithm != "mtp":
        raise ValueError(
            "training.draft.mtp_loss_scaling_factor is set, and "
            f"engine.speculative.algorithm is {drafts.algorithm}. What to do: leave it out; "
            "training.draft.learning_rate says how fast a draft learns."
        )
    if training.draft and model.lora:
        raise ValueError(
            "training.draft is set, and model.lora too: training a draft beside adapters was never "
            "tried. What to do: leave one of them out."
        )
    if training.draft and not cluster.colocate:
        raise ValueError(
            "training.draft is set, and cluster.colocate false: engines on devices of their own "
            "get weights by broadcast, and SGLang takes no draft's so. What to do: leave one of "
            "them out."
        )
    refused = {
        "the tokens of rejected drafts overwrite the engine's record of experts "
        "(training.use_rollout_routing_replay)": training.use_rollout_routing_replay,
        "drafts are verified several tokens at a time, which is not known to give the trainer's "
        "bits (training.true_on_policy)": training.true_on_policy,
        "SGLang was not tried with adapters beside the weights of a model that has a draft "
        "(engine.lora: adapter; merged works)": engine.lora == "adapter",
        "SGLang would quantise a draft too, which was never tried (model.quantization, "
        "engine.quantization)": bool(model.quantization or engine.quantization),
        "drafts were tried in engines of one device only (engine.tensor_parallel, "
        "engine.data_parallel)": engine.tensor_parallel > 1 or engine.data_parallel > 1,
        "EAGLE heads were not tried on a model with adapters (model.lora; ngram and standalone "
        "work)": drafts.head is not None and model.lora is not None,
        "the CPU's attention of drafts is the kit's own (engine.attention_backend)": (
            engine.attention_backend != "auto"
        ),
    }
    for why, applies in refused.items():
        if applies:
            raise ValueError(
                f"engine.speculative is set, and {why}. What to do: leave one of them out."
            )


def check_lora(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, cluster: ClusterConfig
) -> None:
    """Raise ValueError for settings that adapters do not go with."""
    if own := [key for key in engine.extra if "lora" in key]:
        raise ValueError(
            f"engine.extra has {own[0]}, and the kit says itself which adapters SGLang has: with "
            "limits of its own it forgets some that are in use. What to do: leave it out, and set "
            "engine.lora and engine.max_loras_per_batch."
        )
    if engine.lora == "adapter":
        _check_adapter_way(model, training, engine, cluster)
    if model.lora is None:
        return
    if training.optimizer != "adamw":
        raise ValueError(
            f"training.optimizer is {training.optimizer}, and model.lora trains adapters, most of "
            "which are too small for blocks of 256 numbers. What to do: leave one of them out."
        )
    if training.ref_update_interval:
        raise ValueError(
            f"training.ref_update_interval is {training.ref_update_interval}, and with model.lora "
            "the reference is the model without its adapter, which does not move. What to do: set "
            "ref_update_interval: 0, or leave model.lora out."
        )
    if model.lora.load_in_4bit and training.optimizer_cpu_offload:
        raise ValueError(
            "training.optimizer_cpu_offload is set, and model.lora.load_in_4bit too: weights in 4 "
            "bits stay on the device, and what is left to move is small. What to do: leave one of "
            "them out."
        )
    if model.lora.modules_to_save and training.true_on_policy:
        raise ValueError(
            "training.true_on_policy is set, and model.lora.modules_to_save too: modules that are "
            "trained whole beside adapters are not known to give the engine's bits. What to do: "
            "leave one of them out."
        )


def _check_adapter_way(
    model: ModelConfig, training: TrainingConfig, engine: EngineConfig, cluster: ClusterConfig
) -> None:
    """Raise ValueError where the engine cannot have the adapters beside its weights."""
    refused = {
        "model.lora is null, so there are no adapters": model.lora is None,
        "model.lora.modules_to_save has modules that are trained whole, which an adapter cannot "
        "carry": bool(model.lora and model.lora.modules_to_save),
        "training.true_on_policy has both sides multiply with one sum of weight and adapter": (
            training.true_on_policy
        ),
        "engine.weight_bits and engine.weight_noise change weights on their way to the engine, and "
        "now none travel": engine.disturbed,
        "SGLang takes new adapters in engines of one device (engine.tensor_parallel, "
        "engine.data_parallel)": engine.tensor_parallel > 1 or engine.data_parallel > 1,
        "engines on devices of their own (cluster.colocate: false) get weights by broadcast, and "
        "SGLang takes no adapters so": not cluster.colocate,
    }
    for why, applies in refused.items():
        if applies:
            raise ValueError(
                f"engine.lora is adapter, and {why}. What to do: set engine.lora: merged, or leave "
                "it out."
            )


_NEUTRAL = frozenset(
    {
        "chunked_prefill_size", "decode_log_interval", "disable_radix_cache",
        "enable_return_routed_experts", "log_level",
        "max_prefill_tokens", "max_queued_requests", "random_seed", "schedule_conservativeness",
        "schedule_policy", "watchdog_timeout",
    }
)  # fmt: skip
"""Settings of SGLang that change when something is computed, and not what."""

_OF_THE_KIT = (
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "padding",
    "return_dict", "return_tensors", "tokenize", "truncation", "max_length",
)  # fmt: skip
"""Arguments of Transformers' `apply_chat_template` that are no variables of the template."""


def check_template_kwargs(data: DataConfig) -> None:
    """Raise ValueError for variables of a chat template that nobody would read."""
    if data.chat_template_kwargs and not data.apply_chat_template:
        raise ValueError(
            "data.chat_template_kwargs is set, but data.apply_chat_template is false. What to do: "
            "set apply_chat_template: true, or leave them out."
        )
    for key in data.chat_template_kwargs:
        if key in _OF_THE_KIT:
            raise ValueError(
                f"data.chat_template_kwargs has {key!r}, which is no variable of a template; the "
                "kit decides it. What to do: leave it out. An assistant's message at the end of "
                "a prompt is continued by itself."
            )


def check_eval_source(source: str | dict[str, str]) -> None:
    """Raise ValueError for held-out sets by name of which one has no name or no source."""
    if isinstance(source, dict) and not (source and all(source) and all(source.values())):
        raise ValueError(
            f"data.eval_source is {source!r}. What to do: give each held-out set a name and a "
            "source, {gsm: test.jsonl, sums: tiny:addition}."
        )


def check_stop(rollout: RolloutConfig, reward: RewardConfig) -> None:
    """Raise ValueError if the format reward looks for a stop string that the text will lack."""
    lost = [stop for stop in rollout.stop if stop and stop in reward.format_pattern]
    if lost and not rollout.include_stop_str_in_output:
        raise ValueError(
            f"reward.format_pattern looks for {lost[0]!r}, which rollout.stop cuts off the text of "
            "a response, so no response would ever have the format. What to do: set "
            "rollout.include_stop_str_in_output: true, or leave it out of the pattern."
        )


def explain(error: ValidationError, root: type[BaseModel]) -> ConfigError:
    """Make a ConfigError with a line for each wrong setting: key, value, and what to do."""
    lines = [_line(dict(item), root) for item in error.errors()]
    if len(lines) == 1:
        return ConfigError(lines[0])
    told = "\n".join(f"- {line}" for line in lines[:MOST_TOLD])
    more = f"\n- and {len(lines) - MOST_TOLD} more" if len(lines) > MOST_TOLD else ""
    return ConfigError(f"{len(lines)} settings are wrong:\n{told}{more}")


MOST_TOLD = 20
_KEY, _VALUE = 80, 200
"""Characters of a wrong setting's name and value in a message."""


def _line(item: dict[str, Any], root: type[BaseModel]) -> str:
    path = [shorten(str(part), _KEY) for part in item["loc"]]
    key = ".".join(path)
    if item["type"] == "extra_forbidden":
        return f"There is no setting {key!r}. {_suggest(path, root)}"
    if item["type"] == "value_error":
        return str(item["ctx"]["error"])
    given = f"{shorten(repr(item['input']), _VALUE)} ({type(item['input']).__name__})"
    if item["type"] in ("model_type", "model_attributes_type"):
        return f"{key} is {given}, but it is a section: write its settings below it."
    return f"{key} is {given}: {item['msg'][0].lower()}{item['msg'][1:]}."


def _suggest(path: list[str], root: type[BaseModel]) -> str:
    """Suggest the section that has a key of this name, another library's counterpart, or the
    nearest key of the same section.
    """
    section = root
    for part in path[:-1]:
        section = _child(section, part) or section
    for name in root.model_fields:
        if (home := _child(root, name)) and path[-1] in home.model_fields:
            return f"Did you mean {name}.{path[-1]}?"
    return counterpart(path) or did_you_mean(path[-1], section.model_fields)


def _child(section: type[BaseModel], name: str) -> type[BaseModel] | None:
    field = section.model_fields.get(name)
    kinds = (field.annotation, *get_args(field.annotation)) if field else ()
    sections = (k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
    return next(sections, None)
