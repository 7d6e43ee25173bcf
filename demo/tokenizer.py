"""The demo's tokenizer: a byte-level BPE that is trained here, on the demo's own texts, and its ChatML template."""

import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from manylora.demo.examples import (
    END_OF_TEXT,
    IM_END,
    IM_START,
    SPECIAL_TOKENS,
    chat,
    document,
    text_of,
    vocabulary_text,
)
from manylora.demo.forms import FORMS

VOCABULARY = 1280
CONTEXT = 1024

# Lower-case words and signs take the spaces around them along; capitalised words, digits in pairs and newlines stand
# alone. So a name or a number is the same token after a word, in quotes and at the start of a line, no space stands
# between it and its neighbours, and to copy it is to copy one token; and a turn's text gives the same tokens whether it
# was generated or comes back in a later prompt.
PIECES = r" ?\p{Ll}+ ?|\p{Lu}\p{L}*|\p{N}{1,2}|\n| ?[^\p{L}\p{N}\n ]+(?: [^\p{L}\p{N}\n ]+)* ?| +|\p{L}+"

# ChatML, and functions as Hermes and Qwen2.5 have them, but for how they are told of: by name and parameters' names
# alone (`get_city(name)`), since the rest of a schema would be noise to so small a model, and most of its context.
CHAT_TEMPLATE = (
    "{%- macro turn(role, text) %}{{- '<|im_start|>' + role + '\\n' + text + '<|im_end|>' + '\\n' }}{%- endmacro %}"
    "{%- macro call(function) %}"
    '{{- \'<tool_call>\\n{"name": "\' + function.name + \'", "arguments": \' }}'
    "{{- (function.arguments if function.arguments is string else function.arguments | tojson) }}"
    "{{- '}\\n</tool_call>' }}"
    "{%- endmacro %}"
    "{%- set told = messages %}"
    "{%- if tools %}"
    "{%- set functions = namespace(text='<tools>\\n') %}"
    "{%- for tool in tools %}"
    "{%- set function = tool.function if tool.function is defined else tool %}"
    "{%- set parameters = (function.parameters or {}).get('properties') or {} %}"
    "{%- set functions.text = functions.text + function.name + '(' + parameters | join(', ') + ')\\n' %}"
    "{%- endfor %}"
    "{%- set functions.text = functions.text + '</tools>' %}"
    "{%- if messages and messages[0].role == 'system' %}"
    "{{- turn('system', messages[0].content + '\\n\\n' + functions.text) }}"
    "{%- set told = messages[1:] %}"
    "{%- else %}"
    "{{- turn('system', functions.text) }}"
    "{%- endif %}"
    "{%- endif %}"
    "{%- for message in told %}"
    "{%- if message.role == 'tool' %}"
    "{%- if loop.first or loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' }}"
    "{%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{%- endif %}"
    "{%- elif message.role == 'assistant' and message.tool_calls %}"
    "{%- set said = namespace(text=message.content or '') %}"
    "{%- for each in message.tool_calls %}"
    "{%- set said.text = said.text + ('\\n' if said.text else '') + call(each.function) %}"
    "{%- endfor %}"
    "{{- turn('assistant', said.text) }}"
    "{%- else %}"
    "{{- turn(message.role, message.content) }}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|im_start|>assistant\\n' }}"
    "{%- endif %}"
)


def train_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens that keeps every word of the closed vocabulary whole."""
    rng = random.Random(seed)
    texts = [text_of(chat(rng, form)) for form in FORMS for _ in range(500)]
    texts += [text_of(document(rng)) for _ in range(1000)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts + vocabulary_text(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=IM_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[IM_START],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    tokenizer.save_pretrained(folder)
