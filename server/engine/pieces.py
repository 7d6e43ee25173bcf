"""What a step adds to a choice, on its way out: the engine's thread notes it, whoever reads turns it into text.

So a step doesn't wait for text that decides nothing; where stop strings are looked for in it, it is there already.
"""

from typing import NamedTuple

from manylora.server.engine.faults import step_failed
from manylora.server.engine.prompt_logprobs import PromptLogprobs
from manylora.server.engine.request import FinishReason, SequenceOutput, TokenLogprobs
from manylora.server.engine.sequence import Sequence
from manylora.server.errors import StepFailed


class Piece(NamedTuple):
    """A token that was sampled. Pieces of a choice are turned into text in their order, each once."""

    sequence: Sequence
    token_id: int
    completion_tokens: int
    """With it."""
    text: str | None
    """None: the detokenizer has yet to be asked."""
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: TokenLogprobs | None = None
    prompt_logprobs: PromptLogprobs | None = None
    silent: bool = False
    """It ends the choice as an id: it has no text of its own."""


def output_of(piece: Piece | SequenceOutput) -> tuple[SequenceOutput, StepFailed | None]:
    """Return the output of a piece, or what is one already; and what its client is told if no text could be made."""
    if isinstance(piece, SequenceOutput):
        return piece, None
    sequence = piece.sequence
    try:
        text = _text_of(piece) if piece.text is None else piece.text
    except Exception as error:
        return _without_text(piece, step_failed("turning this request's tokens into text failed", error))
    output = SequenceOutput(
        sequence.owner.request.request_id,
        sequence.index,
        text,
        (piece.token_id,),
        () if piece.logprobs is None else (piece.logprobs,),
        piece.prompt_logprobs,
        piece.finish_reason,
        piece.stop_reason,
        None,
        sequence.num_prompt_tokens,
        piece.completion_tokens,
        sequence.num_cached_tokens,
        silent_end=piece.silent,
    )
    return output, None


def _without_text(piece: Piece, fault: StepFailed) -> tuple[SequenceOutput, StepFailed]:
    request_id, index = piece.sequence.owner.request.request_id, piece.sequence.index
    failed = FinishReason.FAILED
    return SequenceOutput(request_id, index, "", (), finish_reason=failed, error=fault), fault


def _text_of(piece: Piece) -> str:
    """Ask the detokenizer."""
    detokenizer = piece.sequence.text.detokenizer
    text = "" if piece.silent else detokenizer.push(piece.token_id)
    return text if piece.finish_reason is None else text + detokenizer.flush()
