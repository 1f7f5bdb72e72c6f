"""The character-level tokenizer: one token per printable ASCII character, nothing to learn.

One character is one token, so a student can read token ids, log-probs and masks off a table
without knowing what a merge is, and text of any kind goes in and comes back unchanged. Characters
outside ASCII become `<unk>`.

    <|user|>37+45=<|end|><|assistant|>82<|end|>
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END = "<pad>", "<unk>", "<|end|>"
ROLES = ("system", "user", "assistant", "tool")
SPECIAL_TOKENS = (PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES))
CHARACTERS = ("\n", "\t", *map(chr, range(32, 127)))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant', 'tool'] -%}"
    "{{- raise_exception('Unknown role ' + message['role'] + "
    "': use system, user, assistant or tool.') -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`; `max_length` is the model's context.

    It is a BPE without merges: that splits text into characters, needs no pre-tokenizer that
    could eat white space, and is a form every Hugging Face consumer knows.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *CHARACTERS))}
    backend = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token=UNKNOWN))
    backend.decoder = Fuse()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
        padding_side="left",
    )
