"""What makes an adapter an activated one (aLoRA, arXiv 2504.12397): the tokens from which on it acts.

peft keeps them in its config's ``alora_invocation_tokens``; the adapter's factors are LoRA's. Older files have the text
beside the ids (``invocation_string``): which ids it stands for is the tokenizer's, so the ids alone count.
"""

from collections.abc import Mapping

from manylora.adapters.config_fields import CONFIG_FILE, shown
from manylora.adapters.errors import InvalidAdapter, UnsupportedAdapter

FIELD = "alora_invocation_tokens"
STRING = "invocation_string"
FIELDS = (FIELD, STRING)
LONGEST = 256
"""Tokens of an invocation: each prompt for the adapter is searched for them."""
_BESIDE = {
    "use_dora": "DoRA's magnitudes scale the base's own rows on every token",
    "modules_to_save": "whole modules are in place of the base's on every token",
    "trainable_token_indices": "trained embeddings are in place of the base's on every token",
}
"""Fields that don't go with an invocation, and why not: what comes before it would not be the base's."""


def read_invocation(config: Mapping[str, object]) -> tuple[int, ...]:
    """Return the ids that a decoded adapter_config.json names; () if it is no activated adapter.

    Raises InvalidAdapter for what is no list of ids, UnsupportedAdapter for kinds that don't go with one.
    """
    value, text = config.get(FIELD), config.get(STRING)
    if text is not None and not isinstance(text, str):
        raise InvalidAdapter(f"{STRING} is {shown(text)}; expected a string", file=CONFIG_FILE)
    if value is None:
        if text:
            raise UnsupportedAdapter(
                f"{STRING} is set without {FIELD}: this is an activated LoRA whose tokens are not told; write the ids "
                f"that its tokenizer gives {shown(text)} into {FIELD}",
                file=CONFIG_FILE,
            )
        return ()
    if not isinstance(value, list) or not value or not all(_is_id(each) for each in value):
        raise InvalidAdapter(
            f"{FIELD} is {shown(value)}; expected a list of token ids, at least one, or null for a LoRA that "
            "always acts",
            file=CONFIG_FILE,
        )
    if len(value) > LONGEST:
        raise InvalidAdapter(f"{FIELD} has {len(value)} ids, at most {LONGEST} are served", file=CONFIG_FILE)
    _refuse_beside(config)
    return tuple(value)


def check_invocation(invocation: tuple[int, ...], vocab_size: int | None) -> None:
    """Raise InvalidAdapter for ids that the base has no token for."""
    if invocation and vocab_size is not None and max(invocation) >= vocab_size:
        raise InvalidAdapter(
            f"{FIELD} has the token id {max(invocation)}, but the base's vocabulary has {vocab_size} tokens, ids 0 to "
            f"{vocab_size - 1}: no prompt can have it",
            file=CONFIG_FILE,
        )


def refuse_vocabulary(invocation: tuple[int, ...]) -> None:
    """Raise UnsupportedAdapter for an activated adapter that changes embedding or head."""
    if invocation:
        raise UnsupportedAdapter(
            f"{FIELD} is set, and the adapter changes embedding or head: an activated LoRA leaves what comes before "
            "its invocation to the base, so it adapts linear layers of the blocks alone",
            file=CONFIG_FILE,
        )


def refuse_merging(invocation: tuple[int, ...]) -> None:
    """Raise UnsupportedAdapter for an activated adapter that is to become part of weights, which act on every token."""
    if invocation:
        raise UnsupportedAdapter(
            f"{FIELD} is set: an activated LoRA acts from its invocation on and leaves what comes before to the base, "
            "so it can't be merged into weights or into another adapter; serve it beside the base",
            file=CONFIG_FILE,
        )


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_beside(config: Mapping[str, object]) -> None:
    for key, why in _BESIDE.items():
        if config.get(key):
            raise UnsupportedAdapter(
                f"{key} is set beside {FIELD}: {why}, so neither is served", file=CONFIG_FILE
            )
    if config.get("bias") not in (None, "none"):
        raise UnsupportedAdapter(
            f"bias is {shown(config['bias'])} beside {FIELD}: trained biases are in place of the base's on every token,"
            " so neither is served",
            file=CONFIG_FILE,
        )
    if config.get("task_type") == "FEATURE_EXTRACTION":
        raise UnsupportedAdapter(
            f"task_type is FEATURE_EXTRACTION beside {FIELD}: peft activates adapters of causal language models alone",
            file=CONFIG_FILE,
        )
