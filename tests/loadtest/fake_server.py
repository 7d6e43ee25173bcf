"""A small OpenAI-compatible server whose models are good and bad ones. Runs in a thread, on a free port."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

START_SECONDS = 20.0


@dataclass
class FakeServer:
    """Models: "good", "cut" (no [DONE]), "boom" (500), "busy" (429), "fault" (an error event), "garbage" (no JSON),
    "moody" (another answer to a prompt that it has seen)."""

    models: tuple[tuple[str, str | None], ...] = (("base", None), ("good", "base"))
    """(name, parent)."""
    takes_ignore_eos: bool = True
    gives_usage: bool = True
    tokenizes: bool = True
    closed_with: str | None = None
    """The key without which it answers 401."""
    stops_after: int = 1000
    lora: tuple[str, ...] | None = None
    """Paths of llama.cpp's --lora list; None: it is no llama.cpp."""
    url: str = ""
    bodies: list[dict[str, object]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    seen: Counter[str] = field(default_factory=Counter)

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/v1/models", self._list),
                Route("/v1/completions", self._complete, methods=["POST"]),
                Route("/v1/chat/completions", self._complete, methods=["POST"]),
                Route("/tokenize", self._tokenize, methods=["POST"]),
                Route("/health", self._health),
                Route("/lora-adapters", self._lora_adapters),
                Route("/generate_stream", self._generate, methods=["POST"]),
            ]
        )

    async def _list(self, request: Request) -> Response:
        if self._is_closed_to(request):
            return Response(status_code=401)
        return JSONResponse({"data": [{"id": name, "parent": parent} for name, parent in self.models]})

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _lora_adapters(self, request: Request) -> Response:
        if self.lora is None:
            return Response(status_code=404)
        listed = [{"id": number, "path": path, "scale": 0.0} for number, path in enumerate(self.lora)]
        return JSONResponse(listed)

    async def _generate(self, request: Request) -> Response:
        """As LoRAX streams: an event for each token, no [DONE]; "cut" ends too early."""
        body = await request.json()
        self.bodies.append(body)
        asked = body["parameters"]["max_new_tokens"]
        cut = body["parameters"].get("adapter_id") == "cut" and asked > 2

        async def events() -> AsyncIterator[str]:
            for number in range(2 if cut else asked):
                last = not cut and number + 1 == asked
                details = {"finish_reason": "length", "generated_tokens": asked, "prompt_tokens": 41}
                token = {"id": number, "text": f" word{number}", "special": False}
                yield _event({"token": token, "generated_text": None, "details": details if last else None})

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _tokenize(self, request: Request) -> Response:
        if not self.tokenizes:
            return Response(status_code=404)
        body = await request.json()
        text = body.get("prompt") or body["messages"][0]["content"]
        return JSONResponse({"count": 2 * len(text.split()) + 1})

    def _is_closed_to(self, request: Request) -> bool:
        key = request.headers.get("authorization")
        return self.closed_with is not None and key != f"Bearer {self.closed_with}"

    async def _complete(self, request: Request) -> Response:
        if self._is_closed_to(request):
            return JSONResponse({"error": {"message": "who are you?", "code": "invalid_api_key"}}, 401)
        body = await request.json()
        self.bodies.append(body)
        self.keys.add(request.headers.get("authorization"))
        model = str(body["model"])
        if "ignore_eos" in body and not self.takes_ignore_eos:
            return JSONResponse({"error": {"message": "ignore_eos?", "code": "unknown_field"}}, 400)
        # The first requests of a run find out what the server takes; they are always answered.
        if model == "boom" and body["max_tokens"] > 2:
            return JSONResponse({"error": {"message": "no", "type": "server_error", "code": None}}, 500)
        if model == "busy" and body["max_tokens"] > 2:
            return JSONResponse({"error": {"message": "later", "code": "queue_full"}}, 429)
        return StreamingResponse(self._events(body, model), media_type="text/event-stream")

    async def _events(self, body: dict[str, object], model: str) -> AsyncIterator[str]:
        prompt = str(body.get("prompt") or body.get("messages"))
        self.seen[prompt] += 1
        asked = body["max_tokens"]
        assert isinstance(asked, int)
        count = min(asked, self.stops_after)
        mood = f"{self.seen[prompt]}" if model == "moody" else "word"
        yield ": keep-alive\n\n"
        for number in range(count):
            text = f" {mood}{number}"
            chat = {"delta": {"content": text}} if "messages" in body else {"text": text}
            finish = ("length" if count == asked else "stop") if number + 1 == count else None
            yield _event({"choices": [{**chat, "index": 0, "finish_reason": finish}], "usage": None})
            if asked > 2 and number == 1 and model in ("cut", "fault", "garbage"):
                if model == "fault":
                    yield _event({"error": {"message": "fell over", "code": "internal_error"}})
                if model == "garbage":
                    yield "data: {not json\n\n"
                return
        if self.gives_usage and "stream_options" in body:
            usage = {"prompt_tokens": 2 * len(prompt.split()) + 1, "completion_tokens": count}
            yield _event({"choices": [], "usage": usage})
        yield "data: [DONE]\n\n"


def _event(value: object) -> str:
    return f"data: {json.dumps(value)}\n\n"


@contextmanager
def running(fake: FakeServer) -> Iterator[FakeServer]:
    """Serve ``fake`` until the block ends; its ``url`` says where."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    fake.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(fake.app(), log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + START_SECONDS
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    try:
        yield fake
    finally:
        server.should_exit = True
        thread.join()
        listening.close()
