"""How a folder's tokenizer is read, by everybody: the server, training, merges, load tests. One rule, in one place.

tokenizer.json is the tokenizer where it is there. transformers' AutoTokenizer builds some families' tokenizers anew
from its vocabulary and merges, by a class that config.json or tokenizer_config.json names, and then other ids come out
than the file gives: an adapter would be trained on one text and asked with another.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manylora.adapters.files import TOKENIZER_JSON

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTENCEPIECE = "tokenizer.model"
_OTHER_FILES = (SENTENCEPIECE, "vocab.json", "tekken.json", "tiktoken.model")


class TokenizerRefused(ValueError):
    """A folder holds no tokenizer, or one that can't be read. One line: what is there, and what to do."""


def load_tokenizer(
    directory: str | Path, *, trust_remote_code: bool = False, **options: object
) -> "PreTrainedTokenizerBase":
    """Return the tokenizer in ``directory``; ``options`` go to transformers. Raises TokenizerRefused.

    tokenizer_config.json has a say in the special tokens' names, in added tokens and in the chat template.
    """
    folder = Path(directory)
    if not has_tokenizer(folder) and not trust_remote_code:
        # transformers would make an empty one.
        names = ", ".join((TOKENIZER_JSON, *_OTHER_FILES))
        raise TokenizerRefused(f"{directory} has no tokenizer: one of {names} must be there")
    try:
        return _class_for(folder).from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=trust_remote_code, **options
        )
    # transformers and tokenizers raise what comes to hand, down to a bare Exception.
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TokenizerRefused(_explained(folder, first)) from error


def import_libraries() -> None:
    """Import what loading takes, a second's work, now rather than with the first tokenizer."""
    import transformers

    _ = transformers.PreTrainedTokenizerFast


def has_tokenizer(directory: Path) -> bool:
    """Whether a tokenizer's vocabulary is there."""
    return any((directory / name).is_file() for name in (TOKENIZER_JSON, *_OTHER_FILES))


def _class_for(directory: Path) -> Any:
    # AutoTokenizer looks through the files of all families, the better part of a second.
    if (directory / TOKENIZER_JSON).is_file():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer


def _explained(directory: Path, reason: str) -> str:
    if (directory / TOKENIZER_JSON).is_file() or not (directory / SENTENCEPIECE).is_file():
        return f"{directory}: the tokenizer can't be loaded: {reason}"
    return (
        f"{directory} has a {SENTENCEPIECE} and no {TOKENIZER_JSON}: that is SentencePiece's own format, which must be "
        "converted once. With `pip install sentencepiece protobuf`: AutoTokenizer.from_pretrained(DIRECTORY)"
        f".save_pretrained(DIRECTORY) of transformers writes {TOKENIZER_JSON}; it could not be done here: {reason}"
    )
