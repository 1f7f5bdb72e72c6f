"""The GPU's kernels on a CPU, by Triton's interpreter: what they compute.

An interpreter says nothing of a GPU's bits: every start of a session with `true_on_policy` looks at
those, and `python -m benchmarks.true_on_policy --gpu`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILE = Path(__file__)


def test_kernels_compute_what_the_cpu_does() -> None:
    """In a process of its own: Triton decides when it is imported whether it interprets."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, str(FILE)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(FILE.parents[2])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == [name for name in sorted(globals()) if name.startswith("check_")]


def check_attention() -> None:
    """Sequences of several lengths, heads that share keys, keys gathered by row."""
    from kit.operators import cpu, cuda_attention

    lengths, heads, groups, size = [70, 1, 9], 6, 2, 16
    ends = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    rows = sum(lengths)
    q, k, v = (draw(rows, n, size) for n in (heads, groups, groups))
    out, total = cuda_attention.attend("triton", q, k, v, ends, ends, (70, 70), 0.25)
    for i, length in enumerate(lengths):
        part = slice(int(ends[i]), int(ends[i + 1]))
        alone = [x[None, part] for x in (q, k, v)]
        first = torch.zeros(1, dtype=torch.long)
        close(out[part], cpu.attend(*alone, first, 0.25)[0])
        keys = k[part].repeat_interleave(heads // groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q[part], keys) * 0.25
        hidden = torch.ones(length, length).triu(1).bool()
        close(total[:, part], scores.masked_fill(hidden, -torch.inf).logsumexp(-1))
    order = torch.randperm(rows)
    places = torch.empty_like(order)
    places[order] = torch.arange(rows)
    gathered = cuda_attention.attend(
        "triton", q, k[order], v[order], ends, ends, (70, 70), 0.25, places.int()
    )
    close(gathered[0], out)
    last, own = q[69:70], torch.tensor([0, 1], dtype=torch.int32)
    seen = torch.tensor([0, 70], dtype=torch.int32)
    alone, _ = cuda_attention.attend("triton", last, k[:70], v[:70], own, seen, (1, 70), 0.25)
    close(alone[0], out[69])


def check_codes() -> None:
    """Groups within and over the ends of what one program reads, to the bit in float32."""
    from kit.operators import cuda, low_precision

    for group, columns in ((64, 448), (128, 8320)):
        codes, scales = low_precision.quantize_int4(draw(3, columns), group)
        found = cuda.read_groups(codes, scales, group, torch.float32)
        assert torch.equal(found, low_precision.read(codes, scales, group, torch.float32))


def check_experts() -> None:
    """Experts with many rows, few and none; a row beside others and by itself; gradients."""
    from kit.operators import cpu, cuda_experts

    x, gate_up, down = draw(70, 40), draw(5, 2 * 24, 40), draw(5, 40, 24)
    logits = draw(70, 5)
    logits[:, 3] = -50.0
    logits[2:, 0] += 6  # more rows than a tile has
    for normalizes in (True, False):
        weights, chosen = cuda_experts.choose(logits, 2, normalizes=normalizes)
        wanted_weights, wanted = cpu.route(logits, 2, normalizes=normalizes)
        assert torch.equal(chosen, wanted)
        close(weights, wanted_weights)
    out = cuda_experts.compute(x, gate_up, down, weights, chosen)
    close(out, cpu.experts(x, gate_up, down, weights, chosen), 1e-4)
    one = [part[67:68] for part in (weights, chosen)]
    close(cuda_experts.compute(x[67:68], gate_up, down, *one), out[67:68], 1e-4)
    padded = chosen.clone()
    padded[3] = -1  # SGLang's mark of a row that fills a graph up
    others = torch.arange(70) != 3
    close(cuda_experts.compute(x, gate_up, down, weights, padded)[others], out[others], 1e-4)
    assert not cuda_experts.compute(x[:0], gate_up, down, weights[:0], chosen[:0]).numel()


def check_experts_gradients() -> None:
    """By the library's grouped products, against the CPU's."""
    from kit.operators import cpu, cuda_experts

    leaves = [draw(30, 40), draw(5, 2 * 24, 40), draw(5, 40, 24), draw(30, 2).abs()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    _, chosen = cpu.route(draw(30, 5), 2, normalizes=True)
    gradient = draw(30, 40)
    ways = cuda_experts.by_library, cpu.experts
    got, wanted = (torch.autograd.grad(way(*leaves, chosen), leaves, gradient) for way in ways)
    for a, b in zip(got, wanted, strict=True):
        close(a, b, 1e-4)


def check_log_sums() -> None:
    """A vocabulary of more than one block."""
    from kit.operators import cuda

    logits, heat = draw(5, 9000) * 4, torch.tensor([0.5, 1.0, 2.0, 1.0, 0.7])
    wanted = torch.log_softmax(logits.double() / heat[:, None], -1)
    close(cuda.log_softmax(logits, heat), wanted)
    total, entropy = cuda.log_sums(logits, heat)
    close(entropy, -(wanted.exp() * wanted).sum(-1))
    chosen = torch.tensor([0, 8999, 5000, 3, 4097])
    close(cuda.log_probs_of(logits, chosen, heat), wanted.gather(1, chosen[:, None])[:, 0])
    one = cuda.log_sums(logits[1:2], torch.ones(1))
    close(one[0], total[1:2])


def check_norm() -> None:
    """Also with a residual, and of heads side by side in place."""
    from kit.operators import cpu, cuda

    x, weight = draw(30, 200), draw(200)
    wanted = cpu.rms_norm(x, weight, 1e-5)
    out = torch.empty_like(x)
    cuda.norm_into(out, x, weight, 1e-5)
    close(out, wanted)
    residual, normed = draw(30, 200), torch.empty_like(x)
    total = residual + x
    cuda.norm_into(normed, x, weight, 1e-5, residual)
    assert torch.equal(residual, total)
    close(normed, cpu.rms_norm(total, weight, 1e-5))
    both, weights = draw(7, 5 * 16), (draw(16), draw(16))
    q, k = both.split([3 * 16, 2 * 16], dim=1)
    wanted_q, wanted_k = (
        cpu.rms_norm(part.reshape(7, -1, 16), w, 1e-5).flatten(1)
        for part, w in zip((q, k), weights, strict=True)
    )
    cuda.norm_heads_into(q, k, q, k, *weights, 1e-5)
    close(q, wanted_q)
    close(k, wanted_k)


def check_product() -> None:
    """Sizes that are no multiple of a tile."""
    from kit.operators import cuda

    x, weight = draw(70, 100), draw(37, 100)
    whole = cuda.kernel_product(x, weight)
    close(whole, x.double() @ weight.double().T)
    close(cuda.kernel_product(x[11:12], weight), whole[11:12])


def check_proof() -> None:
    """Few rows filled up, many in pieces; a library that gives other bits is not taken.

    The interpreter's products of bfloat16 are none, so no library agrees with them.
    """
    from kit.operators import cuda

    assert cuda.prove_products({(24, 32)}, torch.device("cpu"), 1 << 14) == {(24, 32)}
    assert cuda.plain_rows((24, 32)) is None
    weight, x = draw(24, 32), draw(300, 32)
    wanted = x.double() @ weight.double().T
    cuda.PROVEN[24, 32] = range(20, 130)
    for count in (1, 19, 20, 129, 130, 258, 300):
        close(cuda.product(x[:count], weight), wanted[:count])
    assert cuda.plain_rows((24, 32)) == range(256, 130)  # for many rows only, and here for none
    del cuda.PROVEN[24, 32]


def check_route() -> None:
    """Of equal experts the first; rows that are no numbers choose nothing; the gradient."""
    from kit.operators import cuda_experts

    logits = torch.zeros(3, 6)
    logits[1, 4], logits[2] = 1.0, torch.nan
    weights, chosen = cuda_experts.choose(logits, 2, normalizes=True)
    assert chosen.tolist() == [[0, 1], [0, 4], [0, 0]]
    assert weights[0].tolist() == [0.5, 0.5]
    assert weights[2].tolist() == [0.0, 0.0]
    given = draw(7, 12).double().requires_grad_()
    for normalizes in (True, False):
        shares = given.softmax(-1)
        taken, chosen = shares.topk(3, dim=-1)
        whole = taken / taken.sum(-1, keepdim=True) if normalizes else taken
        gradient = draw(7, 3).double()
        wanted = torch.autograd.grad(whole, given, gradient)[0]
        got = cuda_experts.gradient_of_logits(given.detach(), chosen, gradient, normalizes)
        close(got, wanted)


def check_rotation() -> None:
    """Forth, and back again."""
    from kit.operators import cpu, cuda
    from kit.operators.rope import Angles

    turns = draw(40, 6)
    angles, places = Angles(turns.cos(), turns.sin()), torch.arange(20).flip(0) + 11
    q, k = draw(20, 3, 12), draw(20, 2, 12)
    wanted = cpu.rotate(q, k, angles, places)
    flat = q.flatten(1), k.flatten(1)
    out = tuple(torch.empty_like(x) for x in flat)
    tables = places, angles.cosines, angles.sines
    cuda.rotate_into(*out, *flat, *tables)
    for got, want in zip(out, wanted, strict=True):
        close(got, want.flatten(1))
    cuda.rotate_into(*out, *out, *tables, back=True)
    for got, want in zip(out, flat, strict=True):
        close(got, want)


def check_silu() -> None:
    """Halves of one tensor, of more than one block."""
    from kit.operators import cpu, cuda

    gate, up = draw(3, 2600).chunk(2, dim=1)
    close(cuda.silu(gate, up), cpu.silu_and_multiply(gate, up))


if __name__ == "__main__":
    import torch

    source = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        """Normal draws."""
        return torch.randn(shape, generator=source)

    def close(got: torch.Tensor, wanted: torch.Tensor, rounding: float = 2e-5) -> None:
        """Raise where they differ by more than rounding."""
        limits = {"atol": rounding, "rtol": rounding}
        torch.testing.assert_close(got.double(), wanted.double(), **limits)

    for name, check in sorted(globals().items()):
        if name.startswith("check_"):
            check()
            print(name)
