"""What SGLang's sampler gives once the kit's is registered; prints what `test_drawing` compares."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import sglang.srt.layers.sampler as theirs
import torch
from sglang.srt.layers.logits_processor import LogitsProcessorOutput

from kit.engine.gpu import drawing, sampling

drawing.BLOCK, drawing.COLUMNS = 16, 128
SEEDS = torch.tensor([3, 4, 5, 6])
PLACES = torch.tensor([9, 9, 10, 9])


def info(**changes: Any) -> SimpleNamespace:
    """SGLang's sampling parameters of four requests."""
    plain: dict[str, Any] = {
        "is_all_greedy": False,
        "temperatures": torch.tensor([[0.7], [1.0], [1.5], [1.0]]),
        "top_ps": torch.ones(4),
        "top_ks": torch.full((4,), 1 << 30),
        "min_ps": torch.zeros(4),
        "need_top_p_sampling": False,
        "need_top_k_sampling": False,
        "need_min_p_sampling": False,
        "has_custom_logit_processor": False,
        "return_sampling_masks": None,
        "grammars": None,
        "sampling_seed": SEEDS,
    }
    return SimpleNamespace(**plain | changes)


def main() -> None:
    """Draw in each of the ways in which a request may ask for it."""
    theirs.get_server_args = lambda: SimpleNamespace(
        rl_on_policy_target=None, enable_deterministic_inference=False, sampling_backend="pytorch"
    )
    theirs.get_tp_group = lambda: SimpleNamespace(device_group=None)
    theirs.is_dp_attention_enabled = lambda: False
    theirs.sanitize_nan_logits = lambda *_: None
    sampling.register()
    sampler = theirs.Sampler()
    torch.manual_seed(0)
    logits = 2 * torch.randn(4, 150)

    def drawn(
        tops: list[int], given: torch.Tensor = logits, **changes: Any
    ) -> tuple[list[int], LogitsProcessorOutput]:
        output = LogitsProcessorOutput(next_token_logits=given.clone())
        asked = info(**changes), True, tops, [None] * 4, PLACES
        return sampler(output, *asked).tolist(), output

    def apart(tokens: list[int], output: LogitsProcessorOutput, warm: torch.Tensor) -> float:
        known = (logits / warm).log_softmax(-1)[range(4), tokens]
        return float((output.next_token_logprobs - known).abs().max())

    warm, none = info().temperatures, [0] * 4
    tokens, output = drawn(none)
    print("plain", tokens, apart(tokens, output, warm), drawn(none)[0] == tokens)
    likeliest, output = drawn(none, is_all_greedy=True, need_top_k_sampling=True)
    one = torch.ones(4, 1)
    print("greedy", likeliest == logits.argmax(-1).tolist(), apart(likeliest, output, one))
    more, output = drawn([2, 0, 0, 0])
    found = output.next_token_top_logprobs_val[0]
    print("more", len(found), apart(more, output, warm))
    narrow = {"top_ks": torch.full((4,), 2), "need_top_k_sampling": True}
    narrowed = [drawn(none, sampling_seed=SEEDS + 10 * i, **narrow)[0] for i in range(30)]
    best = logits.topk(2).indices.tolist()
    print("narrow", all(token in best[i] for row in narrowed for i, token in enumerate(row)))
    # Rounded to bfloat16 as softmax has them, they would lose a thousandth.
    half = logits.bfloat16()
    tokens, output = drawn([2, 0, 0, 0], half)
    wanted = (half.float() / warm).log_softmax(-1)
    log_probs = output.next_token_logprobs
    top = torch.tensor(output.next_token_top_logprobs_val[0])
    print(
        "widened",
        float((log_probs - wanted[range(4), tokens]).abs().max()),
        float((top - wanted[0].topk(2).values).abs().max()),
    )
    print("both", len({row[0] for row in narrowed}), drawn(none, **narrow)[0] == narrowed[0])


if __name__ == "__main__":
    main()
