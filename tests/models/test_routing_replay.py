"""Replay of experts: a pass takes those that it is told, and routers keep their gradient."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from kit.errors import ModelError
from kit.models import compile, moe
from kit.models.packing import Packed, pack
from kit.models.policy import Policy, load
from kit.tiny import MODEL_DIR
from tests.small_models import make_model, mixture_of_experts

TEMPERATURE = 0.7
SHAPES = [(6, 4), (6, 7), (9, 3), (3, 8)]
RESPONSES = [r for _, r in SHAPES]
DENSE_FIRST: dict[str, Any] = {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}
"""Layers 1 and 3 have experts."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixture_of_experts(tmp_path_factory.mktemp("experts"), **DENSE_FIRST)


@pytest.fixture(scope="module")
def samples() -> list[list[int]]:
    random = torch.Generator().manual_seed(1)
    drawn = [torch.randint(3, 104, (p + r,), generator=random).tolist() for p, r in SHAPES]
    drawn[1][:6] = drawn[0][:6]  # two samples of one prompt
    return drawn


def replayable(folder: Path) -> Policy:
    policy = load(str(folder))
    moe.make_replayable(policy.model)
    return policy


def record(samples: list[list[int]], value: Any = None, seed: int = 3) -> list[np.ndarray]:
    """A record of two random, different experts of each token and layer, or of these."""
    draw = np.random.default_rng(seed)
    rows = []
    for row in samples:
        shape = (len(row) - 1, 2)
        chosen = np.argsort(draw.random((*shape, 4)), axis=-1)[..., :2].astype(np.uint8)
        rows.append(chosen if value is None else np.broadcast_to(value, (*shape, 2)))
    return rows


def packed(samples: list[list[int]], records: Any, **how: Any) -> Packed:
    follow, layers = how.pop("followed", True), how.pop("layers", 2)
    experts = moe.Recorded(records, layers, 2, followed=follow) if records is not None else None
    return pack(samples, RESPONSES, experts=experts, **how)


def results(policy: Policy, of: Packed) -> list[torch.Tensor]:
    """Log-probs, entropies and all gradients of a pass, its table in force throughout."""
    policy.zero_grad()
    policy.train()
    with moe.replaying(of.experts):
        logp, entropy = policy(of, TEMPERATURE)
        (logp.sum() + 0.1 * entropy.sum()).backward()
    zeros = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in policy.parameters()]
    return [logp.detach(), entropy.detach(), *zeros]


def same_bits(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def own_choice(policy: Policy, samples: list[list[int]], **how: Any) -> list[np.ndarray]:
    """What the policy's own pass over these samples chooses, sample by sample."""
    alone = packed(samples, [None] * len(samples), **how)
    with torch.no_grad(), moe.replaying(alone.experts):
        policy(alone, TEMPERATURE)
    assert alone.experts is not None
    return [alone.experts.of_rows(rows[:-1]) for rows in alone.rows_of]


def in_transformers(folder: Path, row: list[int], chosen: np.ndarray) -> torch.Tensor:
    """Log-probs of a sample from plain Transformers, its experts computed by hand.

    The weights are a softmax over all experts, taken at the chosen ones and made to sum to 1.
    """
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    )
    columns = {1: 0, 3: 1}

    def by_hand(layer: int) -> Any:
        block = plain.model.layers[layer].mlp
        table = torch.tensor(chosen[:, columns[layer]].astype(np.int64))

        def forward(hidden: torch.Tensor) -> torch.Tensor:
            x = hidden[0]
            logits = x @ block.gate.weight.T
            out = []
            for t, row in enumerate(x):
                ids = table[t] if t < len(table) else logits[t].topk(2).indices
                p = logits[t].softmax(-1)[ids]
                total = torch.zeros_like(row)
                for share, expert in zip(p / p.sum(), ids.tolist(), strict=True):
                    gate, up = (block.experts.gate_up_proj[expert] @ row).chunk(2)
                    inner = torch.nn.functional.silu(gate) * up
                    total = total + share * (block.experts.down_proj[expert] @ inner)
                out.append(total)
            return torch.stack(out)[None]

        return forward

    for layer in columns:
        plain.model.layers[layer].mlp.forward = by_hand(layer)
    logp = (plain(torch.tensor([row])).logits[0] / TEMPERATURE).log_softmax(-1)
    return logp[torch.arange(len(row) - 1), row[1:]]


def test_replaying_the_own_choice_changes_no_bit_of_log_probs_and_gradients(
    folder: Path, samples: list[list[int]]
) -> None:
    plain, policy = load(str(folder)), replayable(folder)
    expected = results(plain, packed(samples, None))
    assert same_bits(results(policy, packed(samples, None)), expected)  # no table in force
    own = own_choice(policy, samples)
    assert same_bits(results(policy, packed(samples, own)), expected)
    assert same_bits(results(policy, packed(samples, [None] * len(samples))), expected)


def test_given_experts_have_the_log_probs_and_router_gradients_computed_by_hand(
    folder: Path, samples: list[list[int]]
) -> None:
    policy, records = replayable(folder), record(samples)
    got = packed(samples, records, share=False)
    policy.zero_grad()
    with moe.replaying(got.experts):
        logp, _ = policy(got, TEMPERATURE)
        logp.sum().backward()
    parts = logp.split(RESPONSES)
    for own, row, chosen, count in zip(parts, samples, records, RESPONSES, strict=True):
        expected = in_transformers(folder, row, chosen)[-count:]
        assert_close(own, expected, rtol=1e-5, atol=1e-5)
    for router in moe.routers(policy.model).values():
        assert router.weight.grad.abs().max() > 1e-4


def test_a_table_goes_by_the_number_of_the_layer(folder: Path, samples: list[list[int]]) -> None:
    policy = replayable(folder)
    assert moe.replayable_layers(policy.model) == (1, 3)
    assert moe.experts_of(policy.model) == (2, 2)
    first = [np.stack([r[:, 0], own[:, 1]], 1) for r, own in zip(
        record(samples), own_choice(policy, samples), strict=True)]  # fmt: skip
    of = packed(samples, first)
    results(policy, of)
    assert of.experts is not None
    given, own = of.experts.given_TLK, of.experts.own_TLK
    known = given[:, 0, 0] >= 0
    # Layer 1 would choose as it does without a table; what layer 3 reads has changed.
    alone = packed(samples, [None] * len(samples))
    results(policy, alone)
    assert alone.experts is not None
    assert torch.equal(own[:, 0], alone.experts.own_TLK[:, 0])
    assert not torch.equal(own[:, 1], alone.experts.own_TLK[:, 1])
    assert (given[known][:, 0].sort(-1).values != own[known][:, 0].sort(-1).values).any()


@pytest.mark.parametrize("level", ["selective", "alternating", "full"])
def test_recomputing_in_the_backward_pass_takes_the_same_experts(
    folder: Path, samples: list[list[int]], level: compile.Recompute
) -> None:
    records = record(samples)
    expected = results(replayable(folder), packed(samples, records))
    policy = replayable(folder)
    inner: Any = policy.model
    compile.recompute(inner, inner.model.layers, level)
    assert same_bits(results(policy, packed(samples, records)), expected)


def test_shared_rows_take_the_record_of_the_first_sample_and_contradictions_are_counted(
    folder: Path, samples: list[list[int]]
) -> None:
    policy, records = replayable(folder), record(samples)
    records[1][:6] = records[0][:6]
    shared, apart = packed(samples, records), packed(samples, records, share=False)
    assert shared.contradictions == apart.contradictions == 0
    assert len(shared.tokens_T) < len(apart.tokens_T)
    pairs = zip(results(policy, shared), results(policy, apart), strict=True)
    for together, alone in pairs:
        assert_close(together, alone, rtol=1e-4, atol=1e-5)
    records[1][2, 1] = (records[0][2, 1] + 1) % 4  # one token, one layer
    contradicting = packed(samples, records)
    assert contradicting.contradictions == 1
    assert torch.equal(contradicting.experts.given_TLK, shared.experts.given_TLK)  # type: ignore[union-attr]


def test_tokens_without_a_record_choose_for_themselves(
    folder: Path, samples: list[list[int]]
) -> None:
    policy, records = replayable(folder), record(samples)
    records[2][3:] = 255
    records[3][:] = 255
    of = packed(samples, records)
    results(policy, of)
    assert of.experts is not None
    for index, start in ((2, 3), (3, 0)):
        rows = torch.tensor(of.rows_of[index][start:])
        assert (of.experts.given_TLK[rows] == moe.UNKNOWN).all()
        assert torch.equal(of.experts.taken[rows], of.experts.own_TLK[rows])
    nothing = packed(samples, [None] * len(samples))
    assert same_bits(results(policy, nothing), results(policy, packed(samples, None)))


def test_a_record_that_is_only_compared_with_changes_nothing(
    folder: Path, samples: list[list[int]]
) -> None:
    policy, records = replayable(folder), record(samples)
    of = packed(samples, records, followed=False)
    assert same_bits(results(policy, of), results(policy, packed(samples, None)))
    assert of.experts is not None
    share, changed, rows = (float(x) for x in of.experts.agreement())
    assert rows == sum(len(r) for r in records) - 6  # six rows are of two samples
    own, given = of.experts.own_TLK.tolist(), of.experts.given_TLK.tolist()
    known = [(a, b) for a, b in zip(own, given, strict=True) if b[0][0] >= 0]
    layers = [[len({*x} & {*y}) / 2 for x, y in zip(a, b, strict=True)] for a, b in known]
    assert share == pytest.approx(sum(sum(row) / 2 for row in layers))
    assert changed == sum(min(row) < 1 for row in layers)


def test_a_record_of_another_model_is_refused(folder: Path, samples: list[list[int]]) -> None:
    records = [r[:, :1] for r in record(samples)]
    with pytest.raises(ModelError, match=r"is \(9, 1, 2\), and \(9, 2, 2\) is what the trainer's"):
        packed(samples, records)


KINDS = {
    "Qwen2Moe": 2, "Mixtral": 2, "Olmoe": 2, "GptOss": 2, "Glm4Moe": 1, "MiniMaxM2": 2,
    "DeepseekV3": 1,
}  # fmt: skip
"""Families that can be replayed, and layers with experts of their small models."""


@pytest.mark.parametrize("family", KINDS)
def test_routers_with_a_softmax_over_all_experts_or_a_sigmoid_of_each_are_replayable(
    tmp_path: Path, samples: list[list[int]], family: str
) -> None:
    layers = KINDS[family]
    scaled = {"routed_scaling_factor": 1.5} if family in ("Glm4Moe", "DeepseekV3") else {}
    policy = load(str(make_model(tmp_path, family, **scaled)))
    plain = results(policy, packed(samples, None))
    moe.make_replayable(policy.model)
    assert moe.experts_of(policy.model) == (layers, 2)
    records = [each[:, :layers] for each in record(samples)]
    looked = packed(samples, records, followed=False, layers=layers)
    assert same_bits(results(policy, looked), plain)
    assert looked.experts is not None
    own = replace(looked, experts=moe.ExpertTable.of(looked.experts.own_TLK.clone()))
    other = packed(samples, records, layers=layers)
    for a, b in zip(results(policy, own), plain, strict=True):
        assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(results(policy, other)[0], plain[0], atol=1e-3)


def test_a_sigmoid_router_given_experts_weighs_them_as_the_family_does(tmp_path: Path) -> None:
    how = {"routed_scaling_factor": 1.5, "norm_topk_prob": True}
    model: Any = load(str(make_model(tmp_path, "Glm4Moe", **how))).model
    moe.make_replayable(model)
    block = model.model.layers[1].mlp
    logits, given = torch.randn(3, 4), torch.tensor([[0, 3], [2, 1], [1, 0]])
    table = moe.ExpertTable.of(given[:, None])
    with moe.replaying(table):
        chosen, weights = block.route_tokens_to_experts(logits)
    assert torch.equal(chosen, given)
    for t, ids in enumerate(given.tolist()):
        scores = [1 / (1 + math.exp(-float(logits[t, each]))) for each in ids]
        expected = [1.5 * score / sum(scores) for score in scores]
        assert weights[t].tolist() == pytest.approx(expected, rel=1e-5)
    own, _ = block.route_tokens_to_experts(logits)
    assert torch.equal(table.own_TLK[:, 0], own)


def test_other_routers_are_refused_by_name_and_dense_models_have_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = load(str(make_model(tmp_path, "Glm4Moe")))
    kind: Any = type(policy.model.get_submodule("model.layers.1.mlp"))
    route = kind.route_tokens_to_experts

    def otherwise(block: Any, logits: torch.Tensor) -> Any:
        chosen, weights = route(block, logits)
        return chosen, weights.square()

    with monkeypatch.context() as patch:
        patch.setattr(kind, "route_tokens_to_experts", otherwise)
        with pytest.raises(ModelError, match="Glm4MoeMoE weighs them neither by a softmax"):
            moe.make_replayable(policy.model)
    assert moe.experts_of(policy.model) == (0, 0)
    dense = load(str(MODEL_DIR))
    moe.make_replayable(dense.model)
    assert moe.experts_of(dense.model) == (0, 0)
