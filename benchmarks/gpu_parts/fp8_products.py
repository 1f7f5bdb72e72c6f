"""Products of FP8 on this card: their bits, and how fast they are."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any

SHAPES = {
    "0.6b": {
        "qkv": (4096, 1024),
        "o": (1024, 2048),
        "gate_up": (6144, 1024),
        "down": (1024, 3072),
    },
    "4b": {
        "qkv": (6144, 2560),
        "o": (2560, 4096),
        "gate_up": (19456, 2560),
        "down": (2560, 9728),
    },
}
"""(N, K) of the weights of one layer, as an engine has them."""
COUNTS = (1, 16, 64, 128, 256, 1024, 16384)
"""Rows of x."""
LAYERS = 6
"""Whose weights are read one after the other."""
TILES = (
    *((64, 64, 4, stages) for stages in (3, 4, 6)),
    *((64, 32, 4, stages) for stages in (4, 8)),
    (64, 16, 4, 8),
    (128, 64, 8, 4),
    (128, 128, 8, 3),
)
"""As `kit.operators.fp8_cuda.TILE`."""
ODD = (1, 2, 3, 5, 8, 17, 33, 64, 100, 128, 200, 256, 333, 777, 2048, 5000)
"""Numbers of rows at which bits are compared."""


def compare(say: Callable[[str], None]) -> dict[str, Any]:
    """Bits of quantised numbers against torch's, of gradients against simulated ones, of products.

    A product is compared with that of all rows at once, in every tile, and with the library's.
    """
    import torch

    from kit.operators import fp8_cuda, fp8_linear, low_precision

    found: dict[str, Any] = {}
    draw = torch.Generator("cuda").manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, device="cuda", generator=draw)  # noqa: E731
    x = normal(1000, 2560).bfloat16() * 3
    x[3], x[5, :128] = 0, 1e-12
    weight = normal(640, 2560) * 0.02
    weight[:128, :128] = 0
    on_host = low_precision.quantize_fp8(weight.cpu())
    codes, scales = fp8_cuda.quantize_blocks(weight)
    read = low_precision.read(*on_host, 0, torch.bfloat16)
    found["weights"] = [
        torch.equal(codes.cpu().view(torch.uint8), on_host[0].view(torch.uint8)),
        torch.equal(scales.cpu(), on_host[1]),
        torch.equal(fp8_cuda.rounded_blocks(weight, torch.bfloat16).cpu(), read),
    ]
    rows = low_precision.rounded_activations(x.cpu())
    found["activations"] = torch.equal(fp8_cuda.rounded_rows(x).cpu(), rows)
    x_codes, x_scales = fp8_cuda.quantize_rows(x)
    again = (x_codes.float().unflatten(1, (-1, 128)) * x_scales[..., None]).flatten(1)
    found["activations_read"] = torch.equal(again.bfloat16().cpu(), rows)
    broken = x.clone()
    broken[4, 5] = torch.nan
    found["nan"] = bool(fp8_cuda.quantize_rows(broken)[1][4, 0].isnan())
    found["gradient"] = _gradient(
        torch, fp8_cuda, fp8_linear, low_precision, x[:256], weight.bfloat16()
    )
    say(f"bits: {found}")
    own = fp8_cuda.TILE
    for name, (n, k) in [*SHAPES["0.6b"].items(), *SHAPES["4b"].items()]:
        x_wide = normal(max(ODD), k).bfloat16()
        given = fp8_cuda.quantize_rows(x_wide)
        by = fp8_cuda.quantize_blocks(normal(n, k) * 0.02)
        whole = fp8_cuda.kernel_product(given, by, torch.bfloat16)
        exact = _read(given, 1)[:64].double() @ _read(by, 0).double().T
        error = float((whole[:64].double() - exact).abs().max() / exact.abs().max())
        fp8_cuda.prove_products([(n, k)], torch.device("cuda"), of_few=True)
        others, library = [], []
        for count in ODD:
            part = given[0][:count], given[1].T[:, :count].contiguous().T
            for fixed in TILES:
                fp8_cuda.TILE = fixed
                if not torch.equal(
                    fp8_cuda.kernel_product(part, by, torch.bfloat16), whole[:count]
                ):
                    others.append((count, fixed))
            fp8_cuda.TILE = own
            again = fp8_cuda.quantize_rows(x_wide[:count])
            if not torch.equal(fp8_cuda.product(again, by, torch.bfloat16), whole[:count]):
                library.append(count)
        most = fp8_cuda.PROVEN[n, k]
        found[f"{name} {n}x{k}"] = {"error": error, "tiles": others, "chosen": library}
        say(f"{name} {n}x{k}: error {error:.2g}, unequal {others[:6]} {library}, proven {most}")
    return found


def _read(pair: Any, rows: int) -> Any:
    """What codes and scales stand for; `rows` is 1 for activations."""
    codes, scales = pair
    wide = scales.repeat_interleave(128, 1)
    return codes.float() * (wide if rows else wide.repeat_interleave(128, 0))


def _gradient(
    torch: Any, fp8_cuda: Any, fp8_linear: Any, low_precision: Any, x: Any, weight: Any
) -> list[float]:
    """Relative differences of output and gradients from those of simulated products."""
    grads = []
    given = torch.randn(len(x), len(weight), device="cuda").bfloat16()
    for simulated in (False, True):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if simulated:
            read = low_precision.rounded_weight(b, 0, torch.bfloat16)
            out = torch.nn.functional.linear(low_precision.rounded_activations(a), read)
        else:
            out = fp8_linear.linear(a, [b], fp8_cuda.quantize_blocks(b.detach()), 0)
        out.backward(given)
        grads.append((out.detach(), a.grad, b.grad))
    return [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(*grads, strict=True)
    ]


def time(say: Callable[[str], None], shapes: str = "0.6b,4b") -> dict[str, Any]:
    """Microseconds of the products of one layer, by number of rows and way to compute them.

    They are recorded in a graph, of few rows with the weights of several layers, one after the
    other: a card keeps one layer's near.
    """
    import torch

    from kit.operators import fp8_cuda

    found: dict[str, Any] = {}
    for shape, count in itertools.product(shapes.split(","), COUNTS):
        sums: defaultdict[str, float] = defaultdict(float)
        layers = LAYERS if count <= fp8_cuda.DEEP else 1
        fp8_cuda.prove_products(SHAPES[shape].values(), torch.device("cuda"), of_few=True)
        for n, k in SHAPES[shape].values():
            x = torch.randn(count, k, device="cuda").bfloat16()
            plain = [torch.randn(n, k, device="cuda").bfloat16() / 50 for _ in range(layers)]
            given, own = fp8_cuda.quantize_rows(x), [fp8_cuda.quantize_blocks(w) for w in plain]
            ways: dict[str, Callable[[Any], Any]] = {
                "kernel": lambda w, g=given: fp8_cuda.kernel_product(g, w, torch.bfloat16),
                "fp8": lambda w, g=given: fp8_cuda.product(g, w, torch.bfloat16),
                "library": lambda w, g=given: fp8_cuda.library_product(
                    fp8_cuda.filled(*g), w, torch.bfloat16
                ),
            }
            if count == 1:
                del ways["library"]
            for name, way in ways.items():
                sums[name] += _recorded(torch, way, own)
            sums["bf16"] += _recorded(torch, lambda w, x=x: torch.mm(x, w.T), plain)
            sums["quantize x"] += _recorded(torch, fp8_cuda.quantize_rows, [x] * layers)
            if count == COUNTS[-1]:
                sums["quantize w"] += _recorded(torch, fp8_cuda.quantize_blocks, plain)
                bf16 = torch.bfloat16
                sums["read w"] += _recorded(
                    torch, lambda w, to=bf16: fp8_cuda.rounded_blocks(w, to), plain
                )
                sums["read x"] += _recorded(torch, fp8_cuda.rounded_rows, [x])
        k, wide = SHAPES[shape]["qkv"][1], SHAPES[shape]["gate_up"][0]
        sums |= _before(torch, count, k, wide)
        found[f"{shape} {count}"] = dict(sums)
        say(f"{shape}, {count} rows: " + ", ".join(f"{w} {t:.1f}" for w, t in sums.items()))
    return found


def _before(torch: Any, count: int, size: int, wide: int) -> dict[str, float]:
    """Microseconds of what comes before products, with and without quantising."""
    from kit.operators import cuda, fp8_cuda

    x, residual, gate_up = (
        torch.randn(count, columns, device="cuda").bfloat16() for columns in (size, size, wide)
    )
    gate, up = gate_up.chunk(2, dim=-1)
    factor, out = x[0].clone(), torch.empty_like(x)
    ways: dict[str, Callable[[Any], Any]] = {
        "norm": lambda _: cuda.norm_into(out, x, factor, 1e-6, residual),
        "norm that quantizes": lambda _: fp8_cuda.norm_and_quantize(x, factor, 1e-6, residual),
        "silu": lambda _: cuda.silu(gate, up),
        "silu that quantizes": lambda _: fp8_cuda.silu_and_quantize(gate, up),
    }
    return {name: _recorded(torch, way, range(8)) for name, way in ways.items()}


def _recorded(torch: Any, work: Callable[[Any], Any], given: Any) -> float:
    """Microseconds of one of some works, recorded in a graph one after the other: the best of 5."""
    for one in given:
        work(one)
    torch.cuda.synchronize()
    graph, took = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for one in given:
            work(one)
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(4):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        took.append(begin.elapsed_time(end) * 1000 / 4 / len(given))
    return min(took)
