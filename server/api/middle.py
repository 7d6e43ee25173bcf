"""A completion with a suffix: the prompts that ask a model for what stands between two texts."""

from collections.abc import Sequence

from manylora.server.api.asks import PlainPrompts
from manylora.server.api.dependencies import ApiDependencies
from manylora.server.errors import InvalidRequest
from manylora.server.tokenizer import ModelText

MARK = "☺"
"""A character that no tokenizer joins to what follows: with it before a text, the text begins without the space of its
own that SentencePiece puts before each."""


async def with_suffix(
    deps: ApiDependencies, asked: PlainPrompts, prompts: Sequence[Sequence[int]], text: ModelText
) -> tuple[list[Sequence[int]], frozenset[int]]:
    """Return prompts that ask for what stands between each of ``prompts`` and the suffix, and what ends that.

    The prompts are tokenised without the tokens around a text. Raises InvalidRequest if the model has no tokens to be
    asked by, TooManyTokens and QueueFull.
    """
    middle = text.vocabulary.middle
    if middle is None:
        raise InvalidRequest(
            "suffix: the model's tokenizer has no tokens to ask for a middle by (such as <|fim_prefix|>), so it wasn't "
            "trained to fill one in: leave suffix out, or ask a model that was",
            param="suffix",
        )
    lane, context = deps.tokenising.prompts, deps.settings.context_length
    mark = MARK if text.vocabulary.strips_first_space else ""
    marked, plain = await text.codec.encode(
        lane, [mark + asked.suffix, mark], add_special_tokens=False, at_most=context
    )
    begins: list[int] = []
    if asked.add_special_tokens:
        [around] = await text.codec.encode(lane, [""], add_special_tokens=True, at_most=context)
        begins = around[: text.vocabulary.around[0]]
    behind = marked[len(plain) :]
    return [[*begins, *middle.around(prompt, behind)] for prompt in prompts], middle.ends
