"""What answers tell of the model auto: what was chosen and how near it was, and what adapters say of themselves."""

from manylora.server.api.answer import Answer


class NextNear(Answer):
    """What was nearest after the nearest."""

    model: str
    score: float


class AutoChoice(Answer):
    """How the model auto was chosen; scores go from -1 to 1."""

    model: str
    score: float
    nearest: str
    threshold: float
    second: NextNear | None
    prompt_tokens: int


AUTO_MEANING = "Of the model auto: what was chosen, and how near it was. Others have none."


class AdapterWords(Answer):
    """What counts of an adapter for the model auto: what was said of it, else what its files say."""

    description: str | None
    examples: list[str]
    threshold: float | None
