"""Ready configurations, by name. What a preset omits takes its default from `kit.config`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kit.config.schema import SessionConfig


def _qwen3(size: str, kind: str, model: dict[str, Any], training: dict[str, Any]) -> dict[str, Any]:
    """A Qwen3 that answers without thinking first, which would take more tokens."""
    return {
        "name": f"qwen3-{size.lower()}-{kind}",
        "device": "cuda",  # a CPU would need days
        "model": {"name": f"Qwen/Qwen3-{size}"} | model,
        "data": {
            "source": "reasoning_gym:gsm_symbolic",
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "rollout": {"max_response_len": 1024},
        "training": {"rollout_batch_size": 32, "n_samples_per_prompt": 8} | training,
    }


def _qwen3_lora(size: str) -> dict[str, Any]:
    """Adapters, with ten times the learning rate of all weights."""
    lora = {"lora": {"r": 16, "lora_alpha": 32}}
    return _qwen3(size, "lora", lora, {"learning_rate": 1e-5})


PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "name": "tiny",
        "model": {"name": "tiny"},
        "data": {"source": "tiny:addition"},
        "training": {"learning_rate": 1e-4},
    },
    "tiny-chain": {
        "name": "tiny-chain",
        "model": {"name": "tiny"},
        "data": {"source": "tiny:chain"},
        "training": {"learning_rate": 1e-4},
    },
    "tiny-lora": {
        "name": "tiny-lora",
        "model": {"name": "tiny", "lora": {"r": 8}},
        "data": {"source": "tiny:addition"},
        "training": {"learning_rate": 1e-3},  # ten times that of all weights
    },
    "tiny-moe": {
        "name": "tiny-moe",
        "model": {"name": "tiny-moe"},
        "data": {"source": "tiny:addition"},
        "training": {"learning_rate": 1e-4},
        # So that rollouts show the experts, and training them can be compared with replaying them.
        "engine": {"extra": {"enable_return_routed_experts": True}},
    },
    "qwen3-0.6b": {
        "name": "qwen3-0.6b",
        "model": {"name": "Qwen/Qwen3-0.6B"},
        "data": {"source": "reasoning_gym:gsm_symbolic"},
        "training": {"rollout_batch_size": 32, "learning_rate": 1e-6},
    },
    "qwen3-0.6b-gsm8k": {
        "name": "qwen3-0.6b-gsm8k",
        "device": "cuda",  # a CPU would need days
        "model": {"name": "Qwen/Qwen3-0.6B"},
        "data": {
            "source": "openai/gsm8k:main",
            "eval_source": "openai/gsm8k:main",  # of which held-out prompts take the test split
            "input_key": "question",
            "label_key": "answer",
            # The reward looks for the mark that GSM8K's own solutions have.
            "system_prompt": "Think step by step. End with #### and the number.",
        },
        "reward": {"name": "gsm8k"},
        "rollout": {"max_response_len": 1024},
        "training": {
            "num_rollout": 100,
            "rollout_batch_size": 32,
            "n_samples_per_prompt": 8,
            "learning_rate": 1e-6,
        },
        "evaluation": {"interval": 10, "max_prompts": 512},
    },
    "qwen3-0.6b-lora": _qwen3_lora("0.6B"),
    "qwen3-1.7b-lora": _qwen3_lora("1.7B"),
    "qwen3-4b-lora": _qwen3_lora("4B"),
    "qwen3-4b-fp8": _qwen3(
        "4B",
        "fp8",
        {"quantization": "fp8"},
        {"learning_rate": 1e-6, "true_on_policy": True},  # else rounding moves whole steps of FP8
    ),
}


def for_this_machine(config: SessionConfig) -> tuple[SessionConfig, str]:
    """Settings that can train on this machine, and a sentence on what was changed, or "".

    Where there is no GPU and `device` is auto, the model gives way to the tiny one, with its task
    and its learning rate; how much is trained stays. A GPU without the weights changes nothing:
    starting says how to get them.
    """
    from kit.config.schema import SessionConfig
    from kit.config.sections import SHIPPED, RewardConfig
    from kit.utils.hardware import gpu_count

    if config.device != "auto" or config.model.name in SHIPPED or gpu_count():
        return config, ""
    tiny = SessionConfig.preset("tiny")
    tree = config.model_dump()
    tree |= {"model": tiny.model, "data": tiny.data, "reward": RewardConfig()}
    tree["rollout"] |= {"max_response_len": None, "stop": ()}
    tree["training"] |= {
        "learning_rate": tiny.training.learning_rate,
        "max_tokens_per_gpu": None,
    }
    tree["engine"] |= {"mem_fraction_static": None, "attention_backend": "auto"}
    note = (
        f"There is no GPU here, so the tiny model learns to add instead of {config.model.name}: "
        "same batches, same steps, its own learning rate. To have it otherwise, set device: cuda "
        "(refused without a GPU) or device: cpu (slow)."
    )
    return SessionConfig(**tree), note
