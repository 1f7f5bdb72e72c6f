"""FP8's kernels against torch: on a GPU to the bit; without one by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

from kit.operators import cuda, fp8_cuda, fp8_linear, low_precision

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
TILES = [(64, 32, 4, 4), (64, 64, 4, 4), (64, 128, 4, 4), (128, 64, 4, 4), (128, 128, 8, 3)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the kernels themselves are tested")
def test_interpreted_kernels_give_scales_codes_and_products() -> None:
    """The interpreter does not round to e4m3 as GPUs do: most codes are at most a step off, and
    some that should become a power of two are half of it.
    """
    script = """
        import torch
        from kit.operators import cuda, fp8_cuda, low_precision

        torch.manual_seed(0)
        x, weight = torch.randn(37, 384).bfloat16() * 3, torch.randn(256, 384).bfloat16() / 50
        x[3], weight[:128, :128] = 0, 0
        wide = x.float().unflatten(1, (3, 128))
        x_scales = wide.abs().amax(2).clamp_min(1e-10) / 448
        x_codes = (wide / x_scales[:, :, None]).clamp(-448, 448).to(torch.float8_e4m3fn).flatten(1)
        wanted = low_precision.quantize_fp8(weight)
        pairs = (fp8_cuda.quantize_rows(x), (x_codes, x_scales)), (
            fp8_cuda.quantize_blocks(weight), wanted)
        for (codes, scales), (right, right_scales) in pairs:
            assert torch.equal(scales, right_scales)
            size = right.float().abs()
            gap = (right.float() - codes.float()).abs()
            assert (gap <= size / 2 + 2**-9).all()
            assert (gap <= size / 8 + 2**-9).float().mean() > 0.9
        more = torch.randn(128, 256) / 50, torch.randn(128, 384).bfloat16().float()
        groups = (weight.float(), more[1]), (more[0],)
        for own, group in zip(fp8_cuda.quantize_all(groups), groups, strict=True):
            other = fp8_cuda.quantize_blocks(torch.cat(group))
            assert own[0].shape == other[0].shape and torch.equal(own[0].float(), other[0].float())
            assert torch.equal(own[1], other[1]) and own[1].data_ptr() % 16 == 0
        for rows in (1, 37):
            out = fp8_cuda.kernel_product((x_codes[:rows], x_scales[:rows]), wanted, torch.float32)
            read = low_precision.read(*wanted, 0, torch.float32)
            torch.testing.assert_close(
                out, low_precision.rounded_activations(x[:rows].float()) @ read.T,
                rtol=1e-5, atol=1e-5)
        for rows in (1, 37):
            given, factor = x[:rows], torch.randn(384).bfloat16()
            residual = torch.randn(rows, 384).bfloat16()
            added, normed = residual.clone(), torch.empty_like(given)
            cuda.norm_into(normed, given, factor, 1e-6, added)
            own = fp8_cuda.norm_and_quantize(given, factor, 1e-6, residual)
            assert torch.equal(residual, added)
            gate, up = torch.randn(rows, 768).bfloat16().chunk(2, dim=-1)
            for wanted, (out, (codes, scales)) in (
                (normed, own), (cuda.silu(gate, up), fp8_cuda.silu_and_quantize(gate, up))
            ):
                right, right_scales = fp8_cuda.quantize_rows(wanted)
                assert torch.equal(out, wanted) and torch.equal(scales, right_scales)
                assert torch.equal(codes.float(), right.float())
        x[4, 5], weight[0, 0] = torch.nan, torch.inf
        assert fp8_cuda.quantize_rows(x)[1][4].isnan().tolist() == [True, False, False]
        assert fp8_cuda.quantize_blocks(weight)[1].isinf().sum() == 1
    """
    asked = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(asked, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@on_gpu
def test_codes_and_scales_are_torchs_to_the_bit() -> None:
    torch.manual_seed(0)
    weight = torch.randn(640, 1280) / 50  # in float32: rounded to bfloat16 on the way
    weight[:128, :128] = 0
    codes, scales = low_precision.quantize_fp8(weight)
    found = fp8_cuda.quantize_blocks(weight.cuda())
    assert torch.equal(found[0].cpu().view(torch.uint8), codes.view(torch.uint8))
    assert torch.equal(found[1].cpu(), scales)
    read = low_precision.read(codes, scales, 0, torch.bfloat16)
    assert torch.equal(fp8_cuda.rounded_blocks(weight.cuda(), torch.bfloat16).cpu(), read)
    x = torch.randn(333, 1280).bfloat16() * 3
    x[3], x[5, :128] = 0, 1e-12
    rounded = low_precision.rounded_activations(x)
    assert torch.equal(fp8_cuda.rounded_rows(x.cuda()).cpu(), rounded)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_weights_are_quantised_at_once_as_one_by_one(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes = [[(2048, 1024), (1024, 1024)], [(128, 128)], [(1024, 3072)], [(384, 128), (128, 128)]]
    groups = [[torch.randn(*shape, device="cuda").to(dtype) for shape in g] for g in shapes]
    groups[1][0][5, 7] = torch.nan
    for group, (codes, scales) in zip(groups, fp8_cuda.quantize_all(groups), strict=True):
        right, right_scales = fp8_cuda.quantize_blocks(torch.cat(group))
        assert torch.equal(codes.view(torch.uint8), right.view(torch.uint8))
        assert torch.equal(scales.view(torch.int32), right_scales.view(torch.int32))


@on_gpu
@pytest.mark.parametrize("columns", [512, 1024, 2560, 4096])
def test_norms_and_activations_that_quantise_give_the_bits_of_both(columns: int) -> None:
    torch.manual_seed(0)
    for rows in (1, 3, 256, 777):
        x, residual = (torch.randn(rows, columns, device="cuda").bfloat16() * 3 for _ in range(2))
        factor = torch.randn(columns, device="cuda").bfloat16()
        added, again, normed = residual.clone(), residual.clone(), torch.empty_like(x)
        plain = torch.empty_like(x)
        cuda.norm_into(normed, x, factor, 1e-6, added)
        cuda.norm_into(plain, x, factor, 1e-6)
        gate, up = torch.randn(rows, 2 * columns, device="cuda").bfloat16().chunk(2, dim=-1)
        for wanted, (out, (codes, scales)) in (
            (normed, fp8_cuda.norm_and_quantize(x, factor, 1e-6, again)),
            (plain, fp8_cuda.norm_and_quantize(x, factor, 1e-6)),
            (cuda.silu(gate, up), fp8_cuda.silu_and_quantize(gate, up)),
        ):
            right, right_scales = fp8_cuda.quantize_rows(wanted)
            assert torch.equal(out, wanted)
            assert torch.equal(scales, right_scales)
            assert torch.equal(codes.view(torch.uint8), right.view(torch.uint8))
        assert torch.equal(again, added)


@on_gpu
@pytest.mark.parametrize("columns", [256, 1024, 4096])
def test_a_row_has_the_same_bits_in_any_company_and_tile(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    weight = fp8_cuda.quantize_blocks(torch.randn(columns, 2560, device="cuda"))
    codes, scales = fp8_cuda.quantize_rows(torch.randn(2500, 2560, device="cuda").bfloat16())
    whole = fp8_cuda.kernel_product((codes, scales), weight, torch.bfloat16)
    for tile in TILES:
        monkeypatch.setattr(fp8_cuda, "TILE", tile)
        for count in (1, 3, 64, 65, 200, 2500):
            part = codes[:count], scales[:count].T.contiguous().T
            out = fp8_cuda.kernel_product(part, weight, torch.bfloat16)
            assert torch.equal(out, whole[:count]), (tile, count)


@on_gpu
@pytest.mark.parametrize(("columns", "size"), [(1536, 640), (2560, 2048)])
def test_libraries_are_taken_for_products_in_which_they_give_the_kernels_bits(
    columns: int, size: int
) -> None:
    torch.manual_seed(0)
    weight = fp8_cuda.quantize_blocks(torch.randn(columns, size, device="cuda"))
    x = torch.randn(600, size, device="cuda").bfloat16()
    whole = fp8_cuda.kernel_product(fp8_cuda.quantize_rows(x), weight, x.dtype)
    fp8_cuda.prove_products([(columns, size)], x.device, of_few=True)
    assert ((columns, size) in fp8_cuda.DEEP_PROVEN) == (fp8_cuda.deep_gemm() is not None)
    assert (fp8_cuda.PROVEN[columns, size] > 600) == (size == 2048)
    for count in (1, 2, 7, 64, 65, 130, 200, 256, 257, 333, 600):
        found = fp8_cuda.product(fp8_cuda.quantize_rows(x[:count]), weight, x.dtype)
        assert torch.equal(found, whole[:count]), count


@on_gpu
@pytest.mark.parametrize("rows", [(100, 77), (200, 333, 16)])
def test_gradients_pass_as_if_nothing_had_been_rounded(rows: tuple[int, ...]) -> None:
    """Of several weights as of one; and compiled, to the same bits."""
    torch.manual_seed(0)
    weights = [
        (torch.randn(height, 512, device="cuda") / 50).bfloat16().requires_grad_()
        for height in (256, 128, 384)
    ]
    whole = torch.cat([weight.detach() for weight in weights])
    own = fp8_cuda.quantize_blocks(whole)
    fp8_cuda.prove_products({(768, 512)}, torch.device("cuda"))
    most = fp8_cuda.PROVEN[768, 512]
    assert most > max(rows)
    compiled = torch.compile(fp8_linear.linear, dynamic=True, fullgraph=True)
    for count in rows:
        x = torch.randn(count, 512, device="cuda").bfloat16().requires_grad_()
        given = torch.randn(count, 768, device="cuda").bfloat16()
        alone = fp8_cuda.product(fp8_cuda.quantize_rows(x.detach()), own, x.dtype)
        read, rounded = fp8_cuda.rounded_blocks(whole, x.dtype), fp8_cuda.rounded_rows(x.detach())
        for linear in (fp8_linear.linear, compiled):
            out = linear(x, weights, own, most)
            found = torch.autograd.grad(out, (x, *weights), given)
            assert torch.equal(out, alone)
            assert torch.equal(found[0], given @ read)
            assert torch.equal(torch.cat(found[1:]), given.T @ rounded)
