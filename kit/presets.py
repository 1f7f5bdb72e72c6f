"""Ready configurations, by name. What a preset leaves out takes its default from `kit.config`."""

from __future__ import annotations

from typing import Any

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
    "qwen3-0.6b": {
        "name": "qwen3-0.6b",
        "model": {"name": "Qwen/Qwen3-0.6B"},
        "data": {"source": "reasoning_gym:gsm_symbolic"},
        "training": {"rollout_batch_size": 32, "learning_rate": 1e-6},
    },
}
