"""Products of FP8 on this card: their bits, and how fast they are."""

from __future__ import annotations

import itertools
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
COUNTS = (1, 16, 64, 128, 192, 256, 1024, 16384)
"""Rows of x."""
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

    from kit.operators import fp8_cuda, low_precision

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
    found["gradient"] = _gradient(torch, fp8_cuda, low_precision, x[:256], weight.bfloat16())
    say(f"bits: {found}")
    own = fp8_cuda.TILE
    for name, (n, k) in [*SHAPES["0.6b"].items(), *SHAPES["4b"].items()]:
        x_wide = normal(max(ODD), k).bfloat16()
        given = fp8_cuda.quantize_rows(x_wide)
        by = fp8_cuda.quantize_blocks(normal(n, k) * 0.02)
        whole = fp8_cuda.kernel_product(given, by, torch.bfloat16)
        exact = _read(given, 1)[:64].double() @ _read(by, 0).double().T
        error = float((whole[:64].double() - exact).abs().max() / exact.abs().max())
        fp8_cuda.prove_products([(n, k)], torch.device("cuda"))
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


def _gradient(torch: Any, fp8_cuda: Any, low_precision: Any, x: Any, weight: Any) -> list[float]:
    """Relative differences of output and gradients from those of simulated products."""
    grads = []
    given = torch.randn(len(x), len(weight), device="cuda").bfloat16()
    for simulated in (False, True):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        if simulated:
            read = low_precision.rounded_weight(b, 0, torch.bfloat16)
            out = torch.nn.functional.linear(low_precision.rounded_activations(a), read)
        else:
            out = fp8_cuda.fp8_linear(a, b)
        out.backward(given)
        grads.append((out.detach(), a.grad, b.grad))
    return [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(*grads, strict=True)
    ]


def time(say: Callable[[str], None], shapes: str = "0.6b,4b") -> dict[str, Any]:
    """Microseconds of the products of one layer, by number of rows and way to compute them."""
    import torch

    from kit.operators import fp8_cuda

    found: dict[str, Any] = {}
    chosen = fp8_cuda.TILE
    for shape, count in itertools.product(shapes.split(","), COUNTS):
        sums: dict[str, float] = {}
        for name, (n, k) in SHAPES[shape].items():
            x = torch.randn(count, k, device="cuda").bfloat16()
            weight = (torch.randn(n, k, device="cuda") * 0.02).bfloat16()
            given, by = fp8_cuda.quantize_rows(x), fp8_cuda.quantize_blocks(weight)
            fp8_cuda.prove_products([(n, k)], torch.device("cuda"))
            ways: dict[str, Callable[[], Any]] = {
                "bf16": lambda x=x, w=weight: torch.mm(x, w.T),
                "quantize x": lambda x=x: fp8_cuda.quantize_rows(x),
                "fp8": lambda g=given, b=by: fp8_cuda.product(g, b, torch.bfloat16),
            }
            if count == COUNTS[-1]:
                ways["quantize w"] = lambda w=weight: fp8_cuda.quantize_blocks(w)
                ways["read w"] = lambda w=weight: fp8_cuda.rounded_blocks(w, torch.bfloat16)
                ways["read x"] = lambda x=x: fp8_cuda.rounded_rows(x)
            else:
                for fixed in TILES:
                    ways[str(fixed)] = lambda g=given, b=by: fp8_cuda.kernel_product(
                        g, b, torch.bfloat16
                    )
            if count > 64:
                ways["library"] = lambda g=given, b=by: fp8_cuda.library_product(
                    fp8_cuda.filled(*g), b, torch.bfloat16
                )
            each = {}
            for way, once in ways.items():
                fixed = next((f for f in TILES if str(f) == way), None)
                fp8_cuda.TILE = fixed or chosen
                each[way] = _microseconds(torch, once)
                sums[way] = sums.get(way, 0.0) + each[way]
                fp8_cuda.TILE = chosen
            say(f"  {shape} {name} {count}: " + _in_words(each))
        found[f"{shape} {count}"] = sums
        say(f"{shape}, {count} rows: " + _in_words(sums))
    return found


def _in_words(times: dict[str, float]) -> str:
    return ", ".join(f"{way} {value:.1f}" for way, value in times.items())


def _microseconds(torch: Any, once: Callable[[], Any], calls: int = 10) -> float:
    """Of one call, of several in a graph: what launching costs does not show."""
    once()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            once()
    graph.replay()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(3):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * begin.elapsed_time(end) / (3 * calls)
