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

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
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
