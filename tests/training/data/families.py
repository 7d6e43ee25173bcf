"""Chat templates built as those of the known model families are, and small tokenizers to go with them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# Written for these tests; what matters is what each does with system turns, the last turn, white space and ends.
CHATML = """{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}"""

QWEN25 = """{%- if messages[0].role == 'system' %}{%- set ns = namespace(system=messages[0].content) %}
{%- else %}{%- set ns = namespace(system='You are Q.') %}{%- endif %}
{{- '<|im_start|>system\\n' + ns.system }}
{%- if tools %}{{- '\\n\\n# Functions\\n' }}
{%- for tool in tools %}{{- tool | tojson + '\\n' }}{%- endfor %}{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'system' and loop.first %}
{%- elif m.role == 'assistant' and m.tool_calls %}
{{- '<|im_start|>assistant' }}
{%- if m.content %}{{- '\\n' + m.content }}{%- endif %}
{%- for call in m.tool_calls %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}
{{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# Reasoning is kept, or an empty one added, behind the last question alone.
QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- if tools %}{{- '<|im_start|>system\\n' }}{{- tools | tojson }}{{- '<|im_end|>\\n' }}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set text = m.content %}{%- set thought = m.reasoning_content or '' %}
{%- if '</think>' in text %}
{%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set text = text.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + text }}
{%- else %}{{- text }}{%- endif %}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
{%- if call.function.arguments is string %}{{- call.function.arguments }}
{%- else %}{{- call.function.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""

LLAMA3 = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system = messages[0].content | trim %}
{%- set rest = messages[1:] %}{%- else %}{%- set system = '' %}{%- set rest = messages %}{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nKnowledge until: 2023\\n\\n' + system + '<|eot_id|>' }}
{%- for m in rest %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# The system text goes to the last user turn, if that is the end: it moves while a conversation grows.
MISTRAL = """{%- if messages[0].role == 'system' %}{%- set system = messages[0].content %}
{%- set rest = messages[1:] %}{%- else %}{%- set rest = messages %}{%- endif %}
{{- bos_token }}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles have to take turns: user, assistant, user, …') }}{%- endif %}
{%- if m.role == 'user' %}
{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\\n\\n' + m.content + '[/INST]' }}
{%- else %}{{- '[INST] ' + m.content + '[/INST]' }}{%- endif %}
{%- else %}{{- ' ' + m.content | trim + eos_token }}{%- endif %}
{%- endfor %}"""

GEMMA = """{{- bos_token }}
{%- if messages[0].role == 'system' %}{{- raise_exception('no system role here') }}{%- endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles have to take turns') }}{%- endif %}
{%- set role = 'model' if m.role == 'assistant' else m.role %}
{{- '<start_of_turn>' + role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

# Ends the whole text with a token of its own, unless it prompts.
PHI3 = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"""

# Role marks that are no tokens of the vocabulary.
ZEPHYR = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + eos_token + '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""


@dataclass(frozen=True)
class Family:
    template: str
    eos: str
    """What ends a turn."""
    control: tuple[str, ...]
    bos: str | None = None
    end_of_text: str | None = None
    """The tokenizer's own eos token, where a turn ends in another."""
    swallows_space: bool = False
    """Whether control tokens take white space behind them along."""
    sentencepiece: bool = False

    @property
    def eos_token(self) -> str:
        return self.end_of_text or self.eos


IM = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
FAMILIES: Mapping[str, Family] = {
    "chatml": Family(CHATML, "<|im_end|>", IM),
    "qwen2.5": Family(QWEN25, "<|im_end|>", IM),
    "qwen3": Family(QWEN3, "<|im_end|>", IM),
    "llama3": Family(
        LLAMA3,
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
    ),
    "mistral": Family(MISTRAL, "</s>", ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", sentencepiece=True),
    "gemma": Family(
        GEMMA, "<end_of_turn>", ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>"
    ),
    "phi3": Family(
        PHI3,
        "<|end|>",
        ("<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
        end_of_text="<|endoftext|>",
        swallows_space=True,
    ),
    "zephyr": Family(ZEPHYR, "</s>", ("<s>", "</s>"), bos="<s>", sentencepiece=True),
}

TEXTS = [
    "What is the capital of France?\n\nParis is the capital of France.\n",
    "user\nassistant\nsystem\nmodel\nHello there, how are you today?\n\n  I am well.\n",
    '{"name": "weather", "arguments": {"city": "Paris"}}\n<tool_call>\n</tool_call>',
] * 20


@cache
def tokenizer_of(name: str) -> Any:
    """A tokenizer of about 500 tokens, byte-level or, as SentencePiece's, with marks for spaces."""
    family = FAMILIES[name]
    special: Any = [
        AddedToken(token, special=True, normalized=False, rstrip=family.swallows_space)
        for token in family.control
    ]
    if family.sentencepiece:
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token=None))
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    "\n", behavior="isolated"
                ),  # in SentencePiece's a byte, which joins nothing
                pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
            ]
        )
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        alphabet = [chr(code) for code in range(33, 127)] + ["\n", "▁", "é"]
        special += [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        tokenizer = Tokenizer(models.BPE())
        words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(words, behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if family.sentencepiece:
        tokenizer = _with_plain_bytes(tokenizer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=family.bos,
        eos_token=family.eos_token,
        chat_template=family.template,
        clean_up_tokenization_spaces=False,
    )


def _with_plain_bytes(tokenizer: Tokenizer) -> Tokenizer:
    """The same with its byte tokens as ordinary ones; the trainer can only make them as control tokens."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if not token["content"].startswith("<0x")
    ]
    return Tokenizer.from_str(json.dumps(state))
