"""What a model thinks before it answers: between <think> and </think>, wherever a template knows of these."""

from collections.abc import Mapping

from manylora.server.chat.fold import SPACE, Emit, Reader, Sink, up_to

OPEN, CLOSE = "<think>", "</think>"
SWITCH, EFFORT = "enable_thinking", "reasoning_effort"
"""What templates call whether, and how much, to think."""


def known_by(template: str) -> bool:
    """Say whether a template's model may think."""
    return CLOSE in template or OPEN in template


def opened_by(prompt: str) -> bool:
    """Say whether a prompt ends inside of what is thought, so that the answer goes on with it."""
    return prompt.rfind(OPEN) > prompt.rfind(CLOSE) and not prompt[prompt.rfind(OPEN) + len(OPEN) :].strip()


def will_think(template: str, prompt: str, variables: Mapping[str, object]) -> bool:
    """Say whether an answer is expected to think first: it goes on with it, or opens it itself as Qwen3's do."""
    if opened_by(prompt):
        return True
    closed = prompt.rstrip().endswith(CLOSE)
    return known_by(template) and SWITCH in template and not closed and variables.get(SWITCH) is not False


def thinking(sink: Sink, answer: Reader[None], *, opened: bool) -> Reader[None]:
    """Read what is thought, if anything is, and then the answer."""
    next(answer)
    held, ended = "", False
    if not opened:
        held, ended = yield from _opening()
        opened = held.strip(SPACE) == OPEN
    if opened:
        sink.thinking = True
        ended = not (yield from up_to(_told(sink), (CLOSE,), at_end=lambda space: False))
        sink.thinking = False
        held = SPACE[0]
        while not ended and held and held in SPACE:
            held = yield
        ended, held = ended or not held, held.strip(SPACE)
    try:
        for character in held:
            answer.send(character)
        if ended:
            answer.send("")
        while True:
            answer.send((yield))
    except StopIteration:
        return


def _opening() -> Reader[tuple[str, bool]]:
    """Return white space and <think>, or as much as was read until it couldn't be that; and whether that was all."""
    held = ""
    while OPEN.startswith(held.lstrip(SPACE)) and held.lstrip(SPACE) != OPEN:
        character = yield
        if not character:
            return held, True
        held += character
    return held, False


def _told(sink: Sink) -> Emit:
    begun = False

    def emit(text: str) -> None:
        nonlocal begun
        told = text if begun else text.lstrip(SPACE)
        if told:
            begun = True
            sink.reasoning(told)

    return emit
