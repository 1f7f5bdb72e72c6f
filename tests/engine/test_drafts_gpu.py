"""Kernels that verify drafts, on a GPU; in Triton's interpreter see `test_verification`."""

from __future__ import annotations

import pytest
import torch

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


@pytest.mark.parametrize("requests", [1, 8, 200])
@pytest.mark.parametrize("masked", [True, False])
def test_few_tokens_attend_as_written_out(requests: int, masked: bool) -> None:
    from kit.engine.gpu import draft_attention as attention
    from kit.engine.gpu.speculative import whole_mask

    nodes, heads, shared, size = 5, 16, 8, 128
    torch.manual_seed(0)
    cuda = {"device": "cuda", "dtype": torch.bfloat16}
    lens = torch.randint(0, 300, (requests,), device="cuda")
    total, count = int(lens.sum()), requests * nodes
    keys, values = torch.randn(2, total + 50, shared, size, **cuda)
    places = torch.randperm(total + 50, device="cuda")[:total]
    query = torch.randn(count, heads, size, **cuda)
    new_keys, new_values = torch.randn(2, count, shared, size, **cuda)
    own = torch.rand(requests, nodes, nodes, device="cuda") < 0.5
    own |= torch.eye(nodes, dtype=torch.bool, device="cuda")
    if not masked:
        own = torch.ones(nodes, nodes, device="cuda").tril().bool().expand(requests, -1, -1)

    def up_to(sizes: torch.Tensor) -> torch.Tensor:
        return torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])

    begins = up_to(lens)
    layout = up_to(torch.full_like(lens, nodes)), begins.int(), places
    masks = (whole_mask(own, lens, total), up_to((lens + nodes) * nodes)) if masked else None
    out = torch.empty_like(query)
    attention.attend(
        query, new_keys, new_values, out, keys, values, layout, masks, nodes, size**-0.5
    )
    for row in range(0, requests, max(requests // 8, 1)):
        before = places[begins[row] : begins[row + 1]]
        here = slice(row * nodes, (row + 1) * nodes)
        seen = torch.cat([own.new_ones(nodes, len(before)), own[row]], dim=1)
        k = torch.cat([keys[before], new_keys[here]]).repeat_interleave(heads // shared, 1)
        v = torch.cat([values[before], new_values[here]]).repeat_interleave(heads // shared, 1)
        scores = torch.einsum("thd,shd->hts", query[here].float(), k.float()) * size**-0.5
        chances = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        expected = torch.einsum("hts,shd->thd", chances, v.float())
        assert (out[here].float() - expected).abs().max() < 0.03


@pytest.mark.parametrize("wide", [151_936, 1_000])
def test_tokens_are_drawn_at_their_temperature_with_their_log_probs(wide: int) -> None:
    from kit.engine.gpu import drawing

    torch.manual_seed(0)
    requests, nodes, cells = 4_000, 5, 40
    row = torch.full((wide,), -30.0, device="cuda")
    where = torch.randperm(wide, device="cuda")[:cells]
    row[where] = 2 * torch.randn(cells, device="cuda")
    logits = row.expand(requests * nodes, -1)
    temperatures = torch.full((requests, 1), 1.3, device="cuda")
    seeds = torch.arange(requests, device="cuda")
    by_place = seeds, torch.arange(requests * nodes, device="cuda") % nodes
    tokens, log_probs = drawing.draw(logits, temperatures, *by_place, nodes)
    known = (row.double() / 1.3).log_softmax(-1)
    assert (log_probs - known[tokens]).abs().max() < 1e-5
    expected = len(tokens) * known[where].exp()
    seen = (tokens[:, None] == where).sum(0)
    assert seen.sum() == len(tokens)
    few = expected < 5
    chi_square = ((seen - expected)[~few] ** 2 / expected[~few]).sum()
    if few.any():
        chi_square += (seen[few].sum() - expected[few].sum()) ** 2 / expected[few].sum()
    assert chi_square < 80  # about 39 degrees of freedom: exceeded once in ten thousand
    some = slice(1234 * nodes, 1300 * nodes)
    fewer = logits[some], temperatures[1234:1300], seeds[1234:1300], by_place[1][some]
    assert torch.equal(drawing.draw(*fewer, nodes)[0], tokens[some])
    likeliest, log_probs = drawing.draw(logits, None, *by_place, nodes)
    assert (likeliest == row.argmax()).all()
    assert (log_probs - row.double().log_softmax(-1).max()).abs().max() < 1e-5
