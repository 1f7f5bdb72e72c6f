"""Which places the branches of a tree attend to as they are drafted, written out.

SGLang's backend is made without a model, with what its own constructor would have set; Triton's
interpreter runs its kernel.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import torch

from kit.engine.gpu.speculative import whole_steps

LENS, TOPK, STEPS, POOL = [5, 9], 3, 2, 40


def without_a_model(self: Any, runner: Any, topk: int, steps: int) -> None:
    """Stands for the constructor of SGLang's `TritonMultiStepDraftBackend`."""
    self.topk, self.speculative_num_steps = topk, steps
    self.kv_indptr = torch.zeros(steps, len(LENS) * topk + 1, dtype=torch.int32)
    self.req_to_token_pool, self.pool_len = runner.req_to_token_pool, POOL
    self.max_context_len, self.page_size = POOL, 1


def main() -> None:
    """Compare."""
    from sglang.srt.layers.attention.triton_backend import TritonMultiStepDraftBackend

    kind: Any = TritonMultiStepDraftBackend
    kind.__init__ = without_a_model
    torch.manual_seed(0)
    table = torch.randperm(3 * POOL).view(3, POOL).int()
    pool = SimpleNamespace(req_to_token=table)
    backend = whole_steps(SimpleNamespace(req_to_token_pool=pool), TOPK, STEPS)
    lens, rows = torch.tensor(LENS), torch.tensor([2, 0])
    batch = SimpleNamespace(
        batch_size=len(LENS),
        seq_lens=lens,
        seq_lens_sum=sum(LENS),
        req_pool_indices=rows,
        positions=lens.repeat_interleave(TOPK),
        spec_info=SimpleNamespace(),
    )
    found: list[list[list[int]]] = []

    def plan(step: int, batch: Any) -> None:
        ends, places = batch.spec_info.kv_indptr.tolist(), batch.spec_info.kv_indices.tolist()
        assert len(places) == ends[-1]
        found.append([places[a:b] for a, b in itertools.pairwise(ends)])

    whole = torch.zeros(STEPS + 1, len(LENS) * TOPK * POOL, dtype=torch.int64)
    backend.common_template(batch, whole, plan)
    expected = []
    for step in range(1, STEPS + 1):
        seen = []
        for row, length in zip(rows, LENS, strict=True):
            for branch in range(TOPK):
                first = length + branch * STEPS
                own = table[row, first : first + step]
                seen.append([*table[row, :length].tolist(), *own.tolist()])
        expected.append(seen)
    print("as written out" if found == expected else f"{found} is not {expected}")


if __name__ == "__main__":
    main()
