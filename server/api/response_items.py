"""The items of a response, and the events that tell how each of them comes."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from manylora.server.api.blocks import Happening, Part
from manylora.server.api.logprobs import token_logprobs
from manylora.server.api.rendering import Written, dumps
from manylora.server.engine.request import TokenLogprobs
from manylora.server.tokenizer import Vocabulary

Status = Literal["in_progress", "incomplete", "completed"]
Told = tuple[str, dict[str, Any]]
"""An event's type, and its fields but for that and its number."""
Tokens = Callable[[Part], object]
"""What is told of a part's tokens."""


class TokenTexts:
    """What is told of a stream's tokens, as JSON: it is written once, when they come, and told again at each end."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._by_part: defaultdict[int, list[str]] = defaultdict(list)
        self._joined: dict[int, Written] = {}

    def more(self, part: Part, tokens: Sequence[TokenLogprobs]) -> object:
        """Return what is told of a part's next tokens."""
        if not tokens:
            return []
        text = dumps(token_logprobs(tokens, self._vocabulary))
        self._by_part[part.index].append(text[1:-1])
        self._joined.pop(part.index, None)
        return Written(text)

    def of(self, part: Part) -> object:
        """Return what has been told of a part's tokens."""
        texts = self._by_part.get(part.index)
        if not texts:
            return []
        if part.index not in self._joined:
            self._joined[part.index] = Written(f"[{','.join(texts)}]")
        return self._joined[part.index]


def item_id(part: Part, mark: str) -> str:
    """Return an item's id, the same in events and in the response."""
    kinds = {"text": "msg", "thought": "rs", "call": "ctc" if _custom(part) else "fc"}
    return f"{kinds[part.kind]}_{mark[:24]}{part.index:08x}"


def item_of(part: Part, mark: str, status: Status, tokens: Tokens) -> dict[str, Any]:
    """Return an item as far as it has come; one in progress is empty."""
    begun = status == "in_progress"
    head = {"id": item_id(part, mark), "status": status}
    if part.kind == "text":
        content = [] if begun else [content_of(part, tokens)]
        return {"type": "message", **head, "role": "assistant", "content": content}
    if part.kind == "thought":
        content = [] if begun else [content_of(part, tokens)]
        return {"type": "reasoning", **head, "summary": [], "content": content}
    assert part.call is not None
    kind, name = ("custom_tool_call", "input") if _custom(part) else ("function_call", "arguments")
    called = {"call_id": part.call.call_id, "name": part.call.name}
    return {"type": kind, **head, **called, name: "" if begun else part.text}


def content_of(part: Part, tokens: Tokens) -> dict[str, Any]:
    """Return the one part of a message's or a thought's content."""
    if part.kind == "thought":
        return {"type": "reasoning_text", "text": part.text}
    return {"type": "output_text", "text": part.text, "annotations": [], "logprobs": tokens(part)}


def events_of(happening: Happening, mark: str, status: Status, texts: TokenTexts) -> Iterator[Told]:
    """Yield the events that tell what happened to a part; ``status`` is that of an item that ends."""
    what, part, text, tokens = happening
    place = {"output_index": part.index}
    here = {"item_id": item_id(part, mark), **place}
    kind, name = _text_of(part)
    inside = {} if part.kind == "call" else {"content_index": 0}
    if what == "begins":
        yield "response.output_item.added", {**place, "item": item_of(part, mark, "in_progress", texts.of)}
        if inside:
            empty = content_of(Part(part.index, part.kind), texts.of)
            yield "response.content_part.added", {**here, **inside, "part": empty}
    elif what == "goes on":
        probable = {"logprobs": texts.more(part, tokens)} if part.kind == "text" else {}
        yield f"{kind}.delta", {**here, **inside, "delta": text, **probable}
    else:
        probable = {"logprobs": texts.of(part)} if part.kind == "text" else {}
        yield f"{kind}.done", {**here, **inside, **_named(part), name: part.text, **probable}
        if inside:
            yield "response.content_part.done", {**here, **inside, "part": content_of(part, texts.of)}
        yield "response.output_item.done", {**place, "item": item_of(part, mark, status, texts.of)}


def _text_of(part: Part) -> tuple[str, str]:
    """Return what the events of a part's text are called, and the field that has all of it at the end."""
    if part.kind == "text":
        return "response.output_text", "text"
    if part.kind == "thought":
        return "response.reasoning_text", "text"
    if _custom(part):
        return "response.custom_tool_call_input", "input"
    return "response.function_call_arguments", "arguments"


def _named(part: Part) -> dict[str, Any]:
    return {} if part.call is None or _custom(part) else {"name": part.call.name}


def _custom(part: Part) -> bool:
    return part.call is not None and part.call.custom
