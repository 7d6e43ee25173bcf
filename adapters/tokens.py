"""What an adapter brings for the tokenizer: a chat template, and added tokens if the base has them too."""

from pathlib import Path

from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter
from manylora.adapters.files import read_json_object

TOKENS_FILE = "added_tokens.json"
TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_FILE = "tokenizer_config.json"


def check_added_tokens(directory: Path, vocab_size: int | None) -> None:
    """Raise UnsupportedAdapter if added_tokens.json holds ids that the base has no embedding for.

    Many adapters carry the file only to repeat tokens of the base: ids below ``vocab_size`` pass. None: no
    check.
    """
    path = directory / TOKENS_FILE
    if vocab_size is None or not path.exists():
        return
    for token, number in read_json_object(path).items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise InvalidAdapter(f"token {token!r} has id {number!r}; expected an integer", file=TOKENS_FILE)
        if number >= vocab_size:
            raise UnsupportedAdapter(
                f"token {token!r} has id {number}, but the base has ids below {vocab_size}; adapters that add"
                " tokens are not served yet",
                file=TOKENS_FILE,
            )


def read_chat_template(directory: Path) -> str | None:
    """Return chat_template.jinja, else the (default) template of tokenizer_config.json, else None."""
    path = directory / TEMPLATE_FILE
    if path.exists():
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidAdapter(f"is not UTF-8: {error}", file=TEMPLATE_FILE) from error
    path = directory / TOKENIZER_FILE
    template = read_json_object(path).get("chat_template") if path.exists() else None
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
        template = named[-1].get("template") if named else None
    if template is not None and not isinstance(template, str):
        raise InvalidAdapter("chat_template is neither text nor a list of named texts", file=TOKENIZER_FILE)
    return template
