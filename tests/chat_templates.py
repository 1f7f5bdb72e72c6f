"""How families of models mark turns, written anew: templates, what they give, what ends an answer.

Each is as its publisher's, but for tools and for what a system prompt says of the date.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from kit.checkpoint import nanochat_tokenizer
from tests import small_models

ASKED, TOLD, ANSWERED = "1 + 1 = ?", "Be brief.", " 2"
REFUSE = "{{ raise_exception('System role not supported') }}"
CHATML_LOOP = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + SEP + m.content + '<|im_end|>' + END }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant' + SEP }}{% endif %}"
)


@dataclass(frozen=True)
class Turns:
    """A family's turns."""

    special: tuple[str, ...]
    template: str
    asked: str
    """What a question becomes; `{}` stands for it."""
    ends: tuple[str, ...]
    """Tokens that its files name as ends of an answer, each one of them."""
    told: str | None
    """What a question after a system message becomes, as `asked`; None where that is refused."""
    needed: tuple[str, ...]
    """Those without any of which an answer to this template has no end."""
    eos: str
    """The one that the tokenizer names."""
    bos: str | None = None
    adds_bos: bool = False
    """Whether the tokenizer puts it in front of texts."""
    plain: tuple[str, ...] = ()
    """Tokens that are not special."""
    switched: Mapping[str, tuple[dict[str, Any], str]] = field(default_factory=dict)
    """By name: variables of the template, and what a question becomes with them."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """A tokenizer of bytes with these tokens and the template."""

        def post(inner: Any) -> Any:
            ids = [(self.bos, inner.token_to_id(self.bos))]
            return processors.TemplateProcessing(single=f"{self.bos} $A", special_tokens=ids)

        return small_models.tokenizer(
            special=self.special,
            plain=self.plain,
            eos=self.eos,
            bos=self.bos,
            pad=self.special[0],
            template=self.template,
            post=post if self.adds_bos else None,
        )


QWEN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
LLAMA = "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
LLAMA_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"
GEMMA = "<bos><start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
GLM = "[gMASK]<sop><|user|>\n{}<|assistant|>\n"
USER, ASSISTANT = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>"
BEGIN, END = "<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"
EFFORT = "<|start|>system<|message|>Reasoning: {}<|end|>"
HARMONY = "<|start|>user<|message|>{}<|end|><|start|>assistant"

FAMILIES = {
    "Qwen3": Turns(
        special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
        plain=("<think>", "</think>"),
        template=CHATML_LOOP.replace("SEP", "'\n'").replace("END", "'\n'").replace(
            "assistant' + '\n' }}",
            "assistant\n' }}{% if enable_thinking is defined and not enable_thinking %}"
            "{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        ),
        asked=QWEN,
        told="<|im_start|>system\nBe brief.<|im_end|>\n" + QWEN,
        ends=("<|im_end|>", "<|endoftext|>"),
        needed=("<|im_end|>",),
        eos="<|im_end|>",
        switched={
            "without thinking": (
                {"enable_thinking": False}, QWEN + "<think>\n\n</think>\n\n"
            ),
        },
    ),
    "Llama 3": Turns(
        special=(
            "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
            "<|eom_id|>", "<|eot_id|>",
        ),
        template="{{ bos_token }}{% for m in messages %}"
        "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}"
        "{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
        asked="<|begin_of_text|>" + LLAMA + LLAMA_ANSWER,
        told="<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        + LLAMA + LLAMA_ANSWER,
        ends=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        needed=("<|eot_id|>",),
        eos="<|eot_id|>",
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "Gemma 2": Turns(
        special=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}" + REFUSE
        + "{% endif %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
        "{{ '<start_of_turn>' + role + '\n' + m.content + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
        asked=GEMMA,
        told=None,
        ends=("<eos>", "<end_of_turn>"),
        needed=("<end_of_turn>",),
        eos="<eos>",
        bos="<bos>",
        adds_bos=True,
    ),
    "Mistral": Turns(
        special=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        template="{{ bos_token }}{% set told = namespace(text='') %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% set told.text = m.content + '\n\n' %}"
        "{% elif m.role == 'user' %}{{ '[INST]' + told.text + m.content + '[/INST]' }}"
        "{% set told.text = '' %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        asked="<s>[INST]{}[/INST]",
        told="<s>[INST]Be brief.\n\n{}[/INST]",
        ends=("</s>",),
        needed=("</s>",),
        eos="</s>",
        bos="<s>",
        adds_bos=True,
    ),
    "GLM-4.5": Turns(
        special=(
            "<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>",
            "<|observation|>",
        ),
        plain=("<think>", "</think>", "/nothink"),
        template="[gMASK]<sop>{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}"
        "{% if m.role == 'user' and enable_thinking is defined and not enable_thinking %}"
        "{{ '/nothink' }}{% endif %}{% endfor %}{% if add_generation_prompt %}"
        "{{ '<|assistant|>\n' }}{% if enable_thinking is defined and not enable_thinking %}"
        "{{ '<think></think>' }}{% endif %}{% endif %}",
        asked=GLM,
        told="[gMASK]<sop><|system|>\nBe brief.<|user|>\n{}<|assistant|>\n",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
        needed=("<|user|>",),
        eos="<|endoftext|>",
        switched={
            "without thinking": (
                {"enable_thinking": False},
                "[gMASK]<sop><|user|>\n{}/nothink<|assistant|>\n<think></think>",
            ),
        },
    ),
    "DeepSeek": Turns(
        special=(BEGIN, END, USER, ASSISTANT),
        plain=("<think>", "</think>"),
        template="{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
        f"{{% elif m.role == 'user' %}}{{{{ '{USER}' + m.content }}}}"
        f"{{% else %}}{{{{ '{ASSISTANT}</think>' + m.content + eos_token }}}}{{% endif %}}"
        f"{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{ASSISTANT}' }}}}"
        "{{ '<think>' if thinking is defined and thinking else '</think>' }}{% endif %}",
        asked=BEGIN + USER + "{}" + ASSISTANT + "</think>",
        told=BEGIN + "Be brief." + USER + "{}" + ASSISTANT + "</think>",
        ends=(END,),
        needed=(END,),
        eos=END,
        bos=BEGIN,
        adds_bos=True,
        switched={
            "thinking": ({"thinking": True}, BEGIN + USER + "{}" + ASSISTANT + "<think>"),
        },
    ),
    "gpt-oss": Turns(
        special=(
            "<|endoftext|>", "<|startoftext|>", "<|start|>", "<|message|>", "<|channel|>",
            "<|end|>", "<|return|>", "<|call|>",
        ),
        template="{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium')"
        " + '<|end|>' }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\n\n' + m.content + '<|end|>' }}"
        "{% elif m.role == 'assistant' %}"
        "{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
        "{% else %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
        asked=EFFORT.format("medium") + HARMONY,
        told=EFFORT.format("medium")
        + "<|start|>developer<|message|># Instructions\n\nBe brief.<|end|>" + HARMONY,
        ends=("<|return|>", "<|endoftext|>", "<|call|>"),
        needed=("<|return|>",),
        eos="<|return|>",
        bos="<|startoftext|>",
        switched={
            "high effort": ({"reasoning_effort": "high"}, EFFORT.format("high") + HARMONY),
        },
    ),
    "Phi-4": Turns(
        special=("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"),
        template=CHATML_LOOP.replace("SEP", "'<|im_sep|>'").replace(" + END", ""),
        asked="<|im_start|>user<|im_sep|>{}<|im_end|><|im_start|>assistant<|im_sep|>",
        told="<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>{}"
        "<|im_end|><|im_start|>assistant<|im_sep|>",
        ends=("<|im_end|>", "<|endoftext|>"),
        needed=("<|im_end|>",),
        eos="<|im_end|>",
        bos="<|endoftext|>",
    ),
    "nanochat": Turns(
        special=nanochat_tokenizer.SPECIAL,
        template=nanochat_tokenizer.CHAT_TEMPLATE,
        asked="<|bos|><|user_start|>{}<|user_end|><|assistant_start|>",
        told="<|bos|><|user_start|>Be brief.\n\n{}<|user_end|><|assistant_start|>",
        ends=("<|assistant_end|>", "<|bos|>"),
        needed=("<|assistant_end|>",),
        eos="<|assistant_end|>",
        bos="<|bos|>",
    ),
}  # fmt: skip
