"""Layers that multiply codes, as on a GPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

PASSES = """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from kit.models import low_precision
    from kit.operators import fp8_cuda
    from kit.operators.low_precision import Scheme

    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, head_dim=128,
                 num_attention_heads=1, num_key_value_heads=1, vocab_size=50)
    fp8_cuda.PROVEN |= {(384, 128): 0, (128, 128): 0, (512, 128): 0, (128, 256): 0}

    def made(gpu=torch.device("cpu")):
        torch.manual_seed(0)
        model = Qwen3ForCausalLM(Qwen3Config(**sizes))
        low_precision.use(model, Scheme("fp8"), gpu)
        return model

    tokens = torch.arange(40)[None]
    model, simulated = made(), made(None)
    layer = model.model.layers[0].mlp.gate_proj  # which has the codes of up_proj, too
    out, expected = model(tokens).logits, simulated(tokens).logits
    apart = lambda one, other: float((one - other).norm() / other.norm())
    assert apart(out, expected) < 0.2  # the interpreter does not round to e4m3 as GPUs do
    for one, logits in ((model, out), (simulated, expected)):
        logits.square().mean().backward()
    for (name, value), other in zip(
        model.named_parameters(), simulated.parameters(), strict=True
    ):
        assert apart(value.grad, other.grad) < 0.4, (name, apart(value.grad, other.grad))
    with torch.no_grad():
        codes = layer.codes
        assert torch.equal(model(tokens).logits, out) and layer.codes is codes
        layer.weight.mul_(2)
        assert torch.equal(model(tokens).logits, out)
        low_precision.drop_codes()
        assert layer.codes is None
        assert not torch.equal(model(tokens).logits, out)
        layer.weight.div_(2)
        low_precision.drop_codes()
        assert torch.equal(model(tokens).logits, out)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels themselves are tested")
def test_codes_of_weights_are_made_once_until_they_are_dropped() -> None:
    asked = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(PASSES)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
