"""Layers that multiply codes, as on a GPU, by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from kit.models import low_precision
from kit.models.compile import hold_shapes
from kit.operators import fp8_cuda
from kit.operators.low_precision import Scheme

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


def test_all_layers_and_numbers_of_rows_share_compiled_code() -> None:
    """That a layer's codes are others after each step compiles nothing anew; few rows do, once."""
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_hidden_layers": 2, "head_dim": 128}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50}
    proven = {(512, 512): 4096, (512, 256): 4096, (1024, 512): 4096}
    compiled: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    with FakeTensorMode(), patch.dict(fp8_cuda.PROVEN, proven):
        model = Qwen3ForCausalLM(Qwen3Config(**sizes, **heads))
        low_precision.use(model, Scheme("fp8"), torch.device("cpu"))
        layers: list[Any] = list(model.model.layers)
        groups = {part.together for part in model.modules() if hasattr(part, "together")}
        assert sorted(len(group) for group in groups) == [1, 1, 1, 1, 2, 2, 3, 3]
        forwards = [
            torch.compile(layer.forward, backend=count, dynamic=True, fullgraph=True)
            for layer in layers
        ]
        for expected, rows in ((1, 1024), (1, 333), (2, 64), (2, 70), (2, 200)):
            for group in groups:
                shape = sum(part.out_features for part in group), group[0].in_features
                group[0].codes = torch.empty(shape, dtype=torch.float8_e4m3fn)
                group[0].scales = torch.empty(shape[0] // 128, shape[1] // 128)
                hold_shapes(group[0].codes, group[0].scales)
            x, angles = torch.randn(1, rows, 512), torch.randn(1, rows, 128)
            for forward in forwards:
                forward(x, attention_mask=None, position_embeddings=(angles, angles))
            assert len(compiled) == expected, rows
