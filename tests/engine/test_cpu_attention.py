"""The batched CPU attention against a plain computation, request by request."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

pytestmark = pytest.mark.in_sglang
KV_HEADS, GROUPS, SIZE = 2, 3, 8
HEADS = KV_HEADS * GROUPS
SCALE = 0.37

# Tokens in the cache before, and new ones, of each request.
requests = st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=6)


class Pool:
    """A key/value cache of one layer, with what the backend asks of SGLang's own."""

    def __init__(self, slots: int) -> None:
        # Slots that nobody wrote hold what would spoil every sum.
        self.keys = torch.full((slots, KV_HEADS, SIZE), torch.nan)
        self.values = torch.full((slots, KV_HEADS, SIZE), torch.nan)

    def set_kv_buffer(self, layer: Any, where: Any, k: torch.Tensor, v: torch.Tensor) -> None:
        self.keys[where.loc] = k.view(-1, KV_HEADS, SIZE)
        self.values[where.loc] = v.view(-1, KV_HEADS, SIZE)

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        return self.keys

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        return self.values


@dataclass
class Case:
    """A forward pass over requests whose cache slots are scattered."""

    lens: torch.Tensor
    new: torch.Tensor
    rows: torch.Tensor
    table: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    query: torch.Tensor

    @classmethod
    def of(cls, requests: list[tuple[int, int]], seed: int = 0) -> "Case":
        random = torch.Generator().manual_seed(seed)
        lens = torch.tensor([old + new for old, new in requests])
        slots = torch.randperm(int(lens.sum()) + 5, generator=random)
        rows = torch.randperm(len(requests) + 2, generator=random)[: len(requests)]
        table = torch.zeros(len(requests) + 2, 24, dtype=torch.int32)
        for row, part in zip(rows, slots[: lens.sum()].split(lens.tolist()), strict=True):
            table[row, : len(part)] = part.int()
        keys, values = (
            [torch.randn(n, KV_HEADS, SIZE, generator=random) for n in lens.tolist()]
            for _ in range(2)
        )
        new = torch.tensor([n for _, n in requests])
        query = torch.randn(int(new.sum()), HEADS * SIZE, generator=random)
        return cls(lens, new, rows, table, keys, values, query)

    def expected(
        self,
        paths: list[list[int]] | None = None,
        *,
        window: int = 0,
        cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Every new token attends to all tokens before it, one at a time.

        Of the new ones of its request it sees those in `paths`, else itself and those before; of
        all of them the last `window`.
        """
        outputs, first = [], 0
        for keys, values, count in zip(self.keys, self.values, self.new.tolist(), strict=True):
            for i in range(count):
                old = len(keys) - count
                own = paths[i] if paths else range(i + 1)
                seen = [*range(old), *(old + j for j in own)][-window:]
                query = self.query[first + i].view(HEADS, SIZE)
                for head in range(HEADS):
                    k, v = keys[seen, head // GROUPS], values[seen, head // GROUPS]
                    score = k @ query[head] * SCALE
                    if cap:
                        score = cap * torch.tanh(score / cap)
                    total = score.exp().sum()
                    if sinks is not None:
                        total = total + sinks[head].exp()
                    outputs.append((score.exp() / total) @ v)
            first += count
        return torch.stack(outputs).view(len(self.query), -1)

    def attended(
        self,
        *,
        decode: bool = False,
        drafts: Any = None,
        of: Any = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """What the kit's backend makes of it, the new keys and values handed in as SGLang does."""
        from kit.engine.cpu.attention import BatchedCpuAttention

        pool = Pool(int(self.lens.sum()) + 5)
        new_k, new_v, new_slots = [], [], []
        parts = zip(self.rows, self.keys, self.values, self.new.tolist(), strict=True)
        for row, keys, values, count in parts:
            slots = self.table[row, : len(keys)].long()
            old = len(keys) - count
            pool.keys[slots[:old]], pool.values[slots[:old]] = keys[:old], values[:old]
            new_k.append(keys[old:])
            new_v.append(values[old:])
            new_slots.append(slots[old:])
        runner: Any = SimpleNamespace(
            device="cpu",
            req_to_token_pool=SimpleNamespace(req_to_token=self.table),
            token_to_kv_pool=pool,
        )
        backend = BatchedCpuAttention(runner)
        batch: Any = SimpleNamespace(
            seq_lens=self.lens if drafts is None else self.lens - drafts.draft_token_num,
            extend_seq_lens=None if decode else self.new,
            forward_mode=SimpleNamespace(
                is_decode_or_idle=lambda: decode, is_target_verify=lambda: drafts is not None
            ),
            spec_info=drafts,
            req_pool_indices=self.rows,
            out_cache_loc=torch.cat(new_slots),
        )
        backend.init_forward_metadata(batch)
        call = backend.forward_decode if decode else backend.forward_extend
        k, v = (torch.cat(x).flatten(1) for x in (new_k, new_v))
        return call(self.query, k, v, of or layer(), batch, sinks=sinks)


def layer(**changes: Any) -> Any:
    from sglang.srt.layers.radix_attention import AttentionType

    plain = {
        "layer_id": 0,
        "tp_q_head_num": HEADS,
        "tp_k_head_num": KV_HEADS,
        "qk_head_dim": SIZE,
        "v_head_dim": SIZE,
        "scaling": SCALE,
        "sliding_window_size": -1,
        "logit_cap": 0.0,
        "is_cross_attention": False,
        "attn_type": AttentionType.DECODER,
    }
    return SimpleNamespace(**plain | changes)


@settings(deadline=None, max_examples=40)
@given(requests)
def test_new_tokens_attend_to_prefix_and_each_other_as_one_by_one(
    requests: list[tuple[int, int]],
) -> None:
    case = Case.of(requests)
    assert_close(case.attended(), case.expected(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 15), st.just(1)), min_size=1, max_size=8))
def test_decoding_a_batch_is_decoding_each_request(requests: list[tuple[int, int]]) -> None:
    case = Case.of(requests, seed=1)
    assert_close(case.attended(decode=True), case.expected(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(1, 7)), min_size=1, max_size=5),
    st.booleans(),
    st.sampled_from([0, 1, 2, 5, 50]),
    st.sampled_from([0.0, 0.3]),
    st.booleans(),
)
def test_windows_soft_caps_and_sinks_are_as_one_by_one(
    requests: list[tuple[int, int]], decode: bool, window: int, cap: float, has_sinks: bool
) -> None:
    case = Case.of([(old, 1 if decode else new) for old, new in requests], seed=3)
    sinks = torch.linspace(-2, 2, HEADS) if has_sinks else None
    # SGLang's number is of the tokens before; of one token alone it has no number.
    of = layer(sliding_window_size=window - 1 if window > 1 else -1, logit_cap=cap)
    found = case.attended(decode=decode, of=of, sinks=sinks)
    expected = case.expected(window=window if window > 1 else 0, cap=cap, sinks=sinks)
    assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scores", [1, 60, 130, 10_000])
def test_slices_give_what_one_piece_gives(monkeypatch: pytest.MonkeyPatch, scores: int) -> None:
    import kit.engine.cpu.attention as attention

    case = Case.of([(0, 5), (9, 1), (3, 6), (0, 1), (7, 7), (2, 2)])
    monkeypatch.setattr(attention, "PADDED_SCORES", scores)
    plan = attention.plan(case.table, case.rows, case.lens, case.new)
    per_slice = max(1, scores // (7 * 14))
    assert [len(part.query_rows) for part in plan] == [per_slice] * (6 // per_slice) + (
        [6 % per_slice] if 6 % per_slice else []
    ) or len(plan) == 1
    assert_close(case.attended(), case.expected(), rtol=1e-4, atol=1e-5)


@settings(deadline=None, max_examples=40)
@given(requests, st.sampled_from([1, 50, 200, 1 << 22]))
def test_a_plan_gives_every_new_token_one_place_and_no_slice_too_many_scores(
    requests: list[tuple[int, int]], scores: int
) -> None:
    import kit.engine.cpu.attention as attention

    case, original = Case.of(requests), attention.PADDED_SCORES
    attention.PADDED_SCORES = scores
    try:
        plan = attention.plan(case.table, case.rows, case.lens, case.new)
    finally:
        attention.PADDED_SCORES = original
    rows = [
        row
        for part in plan
        for row in (
            part.query_rows if part.is_query is None else part.query_rows[part.is_query]
        ).flatten().tolist()
    ]  # fmt: skip
    assert sorted(rows) == list(range(int(case.new.sum())))
    for part in plan:
        assert part.visible[:, 0].any(-1).all()  # a row that sees nothing would be NaN
        assert part.visible[:, 0].numel() <= scores or len(part.query_rows) == 1


def test_padding_is_marked_only_where_there_is_any() -> None:
    from kit.engine.cpu.attention import plan

    even, uneven = Case.of([(4, 2), (1, 2)]), Case.of([(4, 2), (1, 1)])
    assert plan(even.table, even.rows, even.lens, even.new)[0].is_query is None
    marked = plan(uneven.table, uneven.rows, uneven.lens, uneven.new)[0].is_query
    assert marked is not None
    assert marked.tolist() == [[True, True], [True, False]]


def test_causal_self_attention_is_the_kits_own() -> None:
    from sglang.srt.layers.radix_attention import AttentionType

    from kit.engine.cpu.attention import BatchedCpuAttention

    runner: Any = SimpleNamespace(device="cpu", req_to_token_pool=None, token_to_kv_pool=Pool(1))
    backend = BatchedCpuAttention(runner)
    assert backend.is_supported(layer())
    assert backend.is_supported(layer(sliding_window_size=None))
    assert backend.is_supported(layer(sliding_window_size=4))
    assert not backend.is_supported(layer(is_cross_attention=True))
    assert not backend.is_supported(layer(attn_type=AttentionType.ENCODER_ONLY))
    with pytest.raises(RuntimeError, match="sinks"):
        backend.is_supported(layer(is_cross_attention=True), torch.zeros(HEADS))


def test_registering_puts_it_where_sglang_looks_for_plain_torch() -> None:
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS

    from kit.engine.cpu.attention import BatchedCpuAttention, register

    before = dict(ATTENTION_BACKENDS)
    register()
    try:
        assert ATTENTION_BACKENDS["torch_native"] is BatchedCpuAttention
    finally:
        ATTENTION_BACKENDS.update(before)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 15), min_size=1, max_size=6),
    st.lists(st.integers(0, 3), min_size=1, max_size=5),
    st.booleans(),
)
def test_drafted_tokens_see_what_is_written_and_their_own_path(
    lens: list[int], choices: list[int], chain: bool
) -> None:
    parents = [node if chain else min(node, choice) for node, choice in enumerate(choices)]
    paths = [[0]]
    for node, parent in enumerate(parents, 1):
        paths.append([*paths[parent], node])
    n = len(paths)
    mask = torch.zeros(len(lens), n, n, dtype=torch.bool)
    for node, path in enumerate(paths):
        mask[:, node, path] = True
    drafts = SimpleNamespace(
        draft_token_num=n, tree_topk=1 if chain else -1, custom_mask=mask.flatten()
    )
    case = Case.of([(old, n) for old in lens], seed=2)
    assert_close(case.attended(drafts=drafts), case.expected(paths), rtol=1e-4, atol=1e-5)
    near = layer(sliding_window_size=2)
    if paths == [list(range(node + 1)) for node in range(n)]:
        for topk in (drafts.tree_topk, -1):  # a chain, whatever it is called
            drafts.tree_topk = topk
            found = case.attended(drafts=drafts, of=near)
            assert_close(found, case.expected(window=3), rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"engine\.speculative\.eagle_topk: 1"):
            case.attended(drafts=drafts, of=near)
