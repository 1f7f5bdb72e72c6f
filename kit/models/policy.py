"""`Policy` and `ValueModel`: Transformers models with packed input, as the trainer uses them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kit.errors import ModelError
from kit.models import attention, families, own, shared_operators
from kit.models.log_probs import (
    Distributions,
    forward_kl,
    shared_token_log_probs,
    soft_capped,
    token_log_probs,
)
from kit.models.packing import Packed, repeat_rows, rows_before, take_rows, to_device


def _hidden(backbone: Any, packed: Packed) -> torch.Tensor:
    """Output of the last layer for each row, (T, hidden size)."""
    device, further = packed.tokens_T.device, {}
    if getattr(backbone, "takes_rows_before", False):
        rows_T = to_device(rows_before(packed), device)
        further["rows_before"] = partial(repeat_rows, rows=rows_T)
    output = backbone(
        input_ids=packed.tokens_T[None],
        position_ids=packed.position_T[None],
        use_cache=False,
        packed=attention.layout(packed, device),
        **further,
    )
    hidden: torch.Tensor = output.last_hidden_state[0]
    return hidden


class Policy(nn.Module):
    """Causal language model with packed input that returns log-probs instead of logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.logit_scale = logit_scale(model.config)
        self.logit_cap = logit_cap(model.config)
        self.log_probs_of = token_log_probs

    def share_operators(self, device: torch.device, attention: str = "auto") -> None:
        """Compute with the engine's operators, to the same bits; see `shared_operators.use`."""
        shared_operators.use(self.model, device, attention)
        self.log_probs_of = shared_token_log_probs

    def forward(
        self, packed: Packed, temperature: float, target: Distributions | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Log-prob and entropy of each response token: (logp_R, entropy_R), in nats, float32.

        Args:
            packed: the samples.
            temperature: divides the logits, as in sampling.
            target: another model's distributions in the places of these tokens; what comes out is
                then how far this model's are from them, (kl_R,).
        """
        hidden = _hidden(self.model.model, packed)
        hidden_R = (take_rows if packed.seen_rows is None else repeat_rows)(
            hidden, packed.predictor_R
        )
        head: Any = self.model.lm_head.weight  # type: ignore[union-attr]
        if target is not None:
            return (forward_kl(target, self.distributions(hidden_R, head, temperature)),)
        divisor = temperature / self.logit_scale
        return self.log_probs_of(hidden_R, head, packed.target_R, divisor, self.logit_cap)

    def distributions(
        self, hidden_R: torch.Tensor, head: torch.Tensor, temperature: float
    ) -> Distributions:
        """What it makes of output of the last layer, (R, hidden size).

        Args:
            hidden_R: the output.
            head: the output embedding, whole.
            temperature: divides the logits, as in sampling.
        """
        return Distributions(hidden_R, head, temperature / self.logit_scale, self.logit_cap)

    def logits_of(self, hidden_R: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """Logits before the temperature, (R, vocabulary), float32, from output of the last layer.

        Args:
            hidden_R: the output.
            head: the output embedding, whole.
        """
        logits_R = (hidden_R @ head.to(hidden_R.dtype).T).float()
        return soft_capped(logits_R * self.logit_scale, self.logit_cap)


def logit_scale(config: Any) -> float:
    """Factor that a model puts on its logits: Cohere multiplies by one, Granite divides."""
    return float(getattr(config, "logit_scale", None) or 1) / float(
        getattr(config, "logits_scaling", None) or 1
    )


def logit_cap(config: Any) -> float | None:
    """Soft cap that a model puts on its logits, as Gemma 2 and NanoChat do; None without one."""
    return float(getattr(config, "final_logit_softcapping", None) or 0) or None


def load(path: str, *, trust_remote_code: bool = False) -> Policy:
    """Load a Hugging Face model with float32 weights.

    Raises:
        ModelError: the directory holds no causal language model, or an incomplete one.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    attention.register()
    own.register(path)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            attn_implementation=attention.NAME,
            trust_remote_code=trust_remote_code,
            local_files_only=Path(path).is_dir(),
            output_loading_info=True,
        )
        if loading["missing_keys"]:  # Transformers would go on with random numbers in their place
            raise ValueError(f"its files lack {', '.join(sorted(loading['missing_keys'])[:5])}")
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"The model {path!r} cannot be loaded.",
            why=str(error),
            fix="give a directory with config.json and safetensors of a causal language model.",
        ) from error
    _check_parts(model)
    attention.by_sequence(model, families.find(type(model).__name__).carries_state)
    return Policy(model)


def _check_parts(model: Any) -> None:
    """Raise ModelError for a model whose log-probs need more than `Policy` computes."""
    kind, problem = type(model).__name__, ""
    for name in ("model", "lm_head"):
        if not hasattr(model, name):
            problem = f"{kind} has no part named {name!r}."
    if not problem and getattr(model.lm_head, "bias", None) is not None:
        problem = f"{kind} has a bias in its output layer, which the engine leaves out."
    cap, scale = logit_cap(model.config), logit_scale(model.config)
    if not problem and cap is not None and (scale != 1 or cap < 0):
        problem = f"{kind} has a soft cap of {cap:g} and a factor of {scale:g} on its logits."
    if problem:
        raise ModelError(
            problem, fix="use a decoder-only model of the Llama, Qwen or Mistral kind."
        )


class ValueModel(nn.Module):
    """Critic: the policy's architecture with one number per token instead of logits."""

    def __init__(self, backbone: nn.Module, hidden_size: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.value_head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.value_head.weight)  # so that the first advantages are the returns
        nn.init.zeros_(self.value_head.bias)

    def forward(self, packed: Packed, _temperature: float = 1.0) -> torch.Tensor:
        """Value before each response token: value_R, float32. Called as a `Policy` is."""
        hidden = _hidden(self.backbone, packed)
        rows = repeat_rows(hidden, packed.predictor_R).to(self.value_head.weight.dtype)
        value_R: torch.Tensor = self.value_head(rows)
        return value_R[:, 0].float()
