"""nanochat's tokenizer as Transformers' files, to the same token ids.

nanochat keeps it in `tokenizer.pkl`: tiktoken's `Encoding`, pickled. A pickle can run anything
where it is loaded, so this one is read by an unpickler that makes nothing but plain data and one
inert object in the place of `Encoding`; it imports nothing that the file names.

    pattern   the regular expression that divides a text; tiktoken's and tokenizers' engines agree
              on its classes of characters
    ranks     bytes of each token and its id. tiktoken joins the two neighbours whose bytes
              together have the lowest id, wherever they come from: so every way to divide a token
              into two others is a merge here, in the order of the ids
    special   its markers of turns

What comes out is compared with tiktoken on thousands of texts before it is used, its own tokens
repeated and side by side among them.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from kit.errors import ModelError
from kit.utils.formatting import shorten
from kit.utils.reading import read_bytes

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

BOS, ENDS_TURN = "<|bos|>", "<|assistant_end|>"
SPECIAL = (
    BOS,
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    ENDS_TURN,
    "<|python_start|>",
    "<|python_end|>",
    "<|output_start|>",
    "<|output_end|>",
)
"""nanochat's markers, by the names that its code asks for."""
BYTES = 256
COMPARED = 5_000
"""Texts on which both tokenizers are compared, beside one or two for each token."""

CHAT_TEMPLATE = (
    "{%- macro parts(content) -%}"
    "{%- if content is string -%}{{- content -}}{%- else -%}"
    "{%- for part in content -%}"
    "{%- if part.type == 'text' -%}{{- part.text -}}"
    "{%- elif part.type == 'python' -%}{{- '<|python_start|>' + part.text + '<|python_end|>' -}}"
    "{%- elif part.type == 'python_output' -%}"
    "{{- '<|output_start|>' + part.text + '<|output_end|>' -}}"
    "{%- else -%}{{- raise_exception('There is no part of type ' + part.type + ': use text, "
    "python or python_output.') -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- endmacro -%}"
    "{{- '<|bos|>' -}}"
    "{%- set seen = namespace(turns=0, system='') -%}"
    "{%- for message in messages -%}"
    "{%- if message.role == 'system' and loop.first -%}"
    "{%- set seen.system = message.content + '\\n\\n' -%}"
    "{%- elif message.role != ('user', 'assistant')[seen.turns % 2] -%}"
    "{{- raise_exception('nanochat takes turns: user, assistant, user ..., after one system message"
    " at most; ' + message.role + ' stands elsewhere.') -}}"
    "{%- else -%}"
    "{%- if message.role == 'user' -%}"
    "{{- '<|user_start|>' + seen.system + message.content + '<|user_end|>' -}}"
    "{%- set seen.system = '' -%}"
    "{%- else -%}"
    "{{- '<|assistant_start|>' -}}{{- parts(message.content) -}}{{- '<|assistant_end|>' -}}"
    "{%- endif -%}"
    "{%- set seen.turns = seen.turns + 1 -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if seen.system -%}{{- raise_exception('A system message has to be followed by a user "
    "message.') -}}{%- endif -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant_start|>' -}}{%- endif -%}"
)
"""Conversations as nanochat renders them: a system message stands in front of the first user's."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """What a `tokenizer.pkl` holds."""

    pattern: str
    ranks: Mapping[bytes, int]
    """Id of each token's bytes."""
    special: Mapping[str, int]

    def __len__(self) -> int:
        """Number of tokens, special ones included."""
        return len(self.ranks) + len(self.special)


class _Inert:
    """What stands for tiktoken's `Encoding` where a pickle is read: it keeps its state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _DataOnly(pickle.Unpickler):
    """An unpickler that makes plain data, and `_Inert` for tiktoken's `Encoding`."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")


def read(file: Path) -> Encoding:
    """Read a `tokenizer.pkl` without running anything that it holds.

    Raises:
        ModelError: it is something else, or its tokens are not those of nanochat.
    """
    try:
        found = _DataOnly(io.BytesIO(read_bytes(file))).load()
    except Exception as error:  # a pickle that is no pickle raises anything
        raise _no_tokenizer(file, f"{type(error).__name__}: {error}") from error
    state: Any = found.state if isinstance(found, _Inert) else None
    if isinstance(state, str):
        raise _no_tokenizer(file, f"it names tiktoken's own encoding {state!r}, and has no tokens")
    try:
        encoding = Encoding(state["pat_str"], state["mergeable_ranks"], state["special_tokens"])
        problem = _problem(encoding)
    except (TypeError, KeyError, AttributeError) as error:
        raise _no_tokenizer(file, f"it has no {error} of tiktoken's") from error
    if problem:
        raise _no_tokenizer(file, problem)
    return encoding


def _no_tokenizer(file: Path, why: str) -> ModelError:
    return ModelError(
        f"{file} holds no tokenizer of nanochat.",
        why=f"It is read as data only, never run: {shorten(why, 300)}.",
        fix="give the tokenizer.pkl that nanochat's scripts/tok_train.py wrote, with --tokenizer.",
    )


def _problem(encoding: Encoding) -> str:
    """Describe what is not as nanochat makes it; "" if all is."""
    pattern: Any = encoding.pattern
    ranks, special = encoding.ranks, encoding.special
    if not isinstance(pattern, str):
        return "its pattern is no text"
    if not all(isinstance(t, bytes) and type(i) is int for t, i in ranks.items()):
        return "its tokens are not bytes with an id each"
    if not all(isinstance(t, str) and type(i) is int for t, i in special.items()):
        return "its special tokens are not texts with an id each"
    if missing := [name for name in SPECIAL if name not in special]:
        return f"it has no {', '.join(missing)}"
    if any(bytes([byte]) not in ranks for byte in range(BYTES)):
        return "it has no token for some byte"
    if sorted([*ranks.values(), *special.values()]) != list(range(len(encoding))):
        return "its ids are not 0, 1, 2 ... without a gap"
    return ""


def build(encoding: Encoding, context: int) -> PreTrainedTokenizerFast:
    """The tokenizer, ready for `save_pretrained`, with nanochat's chat template.

    Args:
        encoding: what it encodes by.
        context: the longest text in tokens, which it notes.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(encoding),
        bos_token=BOS,
        eos_token=ENDS_TURN,
        pad_token=BOS,  # nanochat pads nothing
        additional_special_tokens=[name for name in SPECIAL if name not in (BOS, ENDS_TURN)],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=context,
    )


def _backend(encoding: Encoding) -> Tokenizer:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters: dict[int, str] = bytes_to_unicode()

    def spelled(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    vocabulary = {spelled(token): number for token, number in encoding.ranks.items()}
    vocabulary |= encoding.special
    merges = [(spelled(one), spelled(other)) for one, other in _merges(encoding.ranks)]
    # tiktoken looks first whether a whole piece is a token, and merges only if it is not.
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(encoding.pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    ordered = sorted(encoding.special, key=encoding.special.__getitem__)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ordered])
    return backend


def _merges(ranks: Mapping[bytes, int]) -> Iterator[tuple[bytes, bytes]]:
    """Every two tokens whose bytes together are a third one, by its id."""
    for token in sorted(ranks, key=ranks.__getitem__):
        for place in range(1, len(token)):
            if token[:place] in ranks and token[place:] in ranks:
                yield token[:place], token[place:]


def compare(encoding: Encoding, tokenizer: PreTrainedTokenizerFast) -> int:
    """Compare a tokenizer with tiktoken on thousands of texts; how many.

    Raises:
        ModelError: one of them has other ids.
    """
    import tiktoken

    theirs = tiktoken.Encoding(
        name="nanochat",
        pat_str=encoding.pattern,
        mergeable_ranks=dict(encoding.ranks),
        special_tokens=dict(encoding.special),
    )
    texts = [*HOSTILE, *_own_texts(encoding), *_random_texts(encoding)]
    found = tokenizer(texts, add_special_tokens=False)["input_ids"]
    expected = theirs.encode_batch(texts, allowed_special="all")
    for text, one, other in zip(texts, found, expected, strict=True):
        if one != other:
            raise ModelError(
                f"The tokenizer gives {shorten(repr(text), 80)} other ids than tiktoken.",
                why=f"{one[:12]} in place of {other[:12]}.",
                fix="tell us of it, with the tokenizer.pkl; nothing was written.",
            )
    return len(texts)


HOSTILE = (
    "",
    " ",
    "\n",
    " \n \r\n\t\u2028\u00a0\u3000x  y   \n\n  z ",
    "I'm you'Re WE'LL it'\u017f don'T 'sd '''ve",
    "1 12 123 1234567 \u0663\u0664\u0665 \u00bd\u2167 1,234.5e-6",
    "...!!!?\u2026 --> <|not_a_token|> <|bos|>>",
    "<|user_start|>x<|user_end|><|assistant_start|><|assistant_end|><|bos|>",
    "na\u00efve cafe\u0301 \u00df\u1e9e \u01c5 \u0130i\u0307 \ufb03",
    "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f \ud55c\uae00 \u0e44\u0e17\u0e22",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\U00030000\U0001e7e0 \U0002ebf0 \u1c89\ua7cb \U00010d4a\U00016d40",
    "\u202eabc\u202c \u200b\u200c\ufeff \x00\x01\x7f\x85\ufffd\uffff\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa ababababababababab \t\t\t\t\t\t\t        ",
    "def f(x):\n    return {\n        'a': [1, 22, 333],\n    }\n\n\n",
)
"""Texts that tokenizers tend to divide in different ways."""


def _own_texts(encoding: Encoding) -> Iterator[str]:
    """Each token that is a text, repeated, and beside another one."""
    draw = Random(0)
    words = [token.decode("utf-8", "ignore") for token in encoding.ranks]
    for word in words:
        yield word * draw.randint(2, 9)
        yield word + draw.choice(words) + draw.choice(words)


def _random_texts(encoding: Encoding) -> Iterator[str]:
    """Texts of a few letters, of any characters there are, and of tokens and special tokens."""
    draw = Random(1)
    words = [token.decode("utf-8", "ignore") for token in encoding.ranks]
    special = list(encoding.special)
    for number in range(COMPARED):
        size = draw.randint(1, 40)
        match number % 4:
            case 0:
                yield "".join(draw.choices("ab 'sS1\n", k=size))
            case 1:
                yield "".join(map(_character, (draw.random() for _ in range(size))))
            case 2:
                yield "".join(draw.choices(words, k=size))
            case _:
                yield "".join(draw.choices([*draw.choices(words, k=9), *special], k=size))


def _character(place: float) -> str:
    """A character by a number from 0 to 1, of any plane; half of them are of the first 0x3000."""
    code = int(2 * place * 0x3000) if place < 0.5 else int((2 * place - 1) * 0x110000)
    return "\ufffd" if 0xD800 <= code < 0xE000 else chr(code)
