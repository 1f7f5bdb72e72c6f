"""Tokenizers and random models of a few thousand parameters, as unusual as a test wants them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
THINKING = CHATML.replace("assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}")
"""Its answers begin inside a `<think>` that the prompt has opened."""


def tokenizer(
    *,
    special: Sequence[str] = SPECIAL,
    plain: Sequence[str] = (),
    eos: str = "<|im_end|>",
    bos: str | None = None,
    pad: str = "<|endoftext|>",
    template: str | None = CHATML,
    post: Callable[[Any], Any] | None = None,
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a byte, after the special ones.

    Args:
        special: tokens that it holds for special.
        plain: tokens of their own that it does not hold for special.
        eos: its end-of-sequence token.
        bos: its begin-of-sequence token; None has none.
        pad: its padding.
        template: its chat template; None has none.
        post: makes its post-processor, which may add tokens to a text.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["a"], trainer)
    inner.add_tokens([AddedToken(text, special=False, normalized=False) for text in plain])
    if post:
        inner.post_processor = post(inner)
    made = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=bos,
        eos_token=None if eos in plain else eos,
        pad_token=pad,
    )
    made.chat_template = template
    return made


def save(
    folder: Path,
    made: PreTrainedTokenizerFast,
    *,
    eos: str = "<|im_end|>",
    vocabulary: int | None = None,
    eos_token_id: int | None = 2,
    context: int = 256,
) -> Path:
    """Save a tokenizer with a random Qwen2 of two layers; returns the folder.

    Args:
        folder: where to.
        made: what `tokenizer` made.
        eos: the tokenizer's end-of-sequence token, which stays as special as it is.
        vocabulary: rows of the embedding; None takes as many as there are tokens.
        eos_token_id: the one that config.json names; generation_config.json names none.
        context: the longest prompt plus response, in tokens.
    """
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    made.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"eos_token": eos}))
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=vocabulary or len(made),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=context,
            initializer_range=0.2,
            eos_token_id=eos_token_id,
            bos_token_id=None,
        )
    )
    model.save_pretrained(folder)
    (folder / "generation_config.json").write_text("{}")
    return folder
