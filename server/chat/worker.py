"""The worker process that renders adapters' chat templates: ``python -m manylora.server.chat.worker``."""

import json

from manylora.server.chat.render import compile_template, render
from manylora.server.workers.child import serve

MEMORY_BYTES = 512 << 20
"""What a render may take. The largest prompt's text takes a few copies of 64 MiB."""
_ERROR_CHARACTERS = 300


def answer(question: bytes) -> bytes:
    """Compile a template, or render messages by it; a template's failure is an answer too."""
    try:
        asked = json.loads(question)
        template = asked.pop("template")
        if "messages" not in asked:
            compile_template(template)
            return _written({"text": ""})
        most = asked.pop("most_characters")
        text = render(template, asked.pop("messages"), asked.pop("variables"), **asked)
        if len(text) > most:
            return _written({"characters": len(text)})
        return _written({"text": text})
    except MemoryError:
        return _written({"error": f"it took more than {MEMORY_BYTES >> 20} MiB of memory"})
    # A template is a program from outside: it may raise anything.
    except Exception as error:
        said = str(error) or type(error).__name__
        return _written({"error": said[:_ERROR_CHARACTERS].encode(errors="backslashreplace").decode()})


def _written(said: dict[str, object]) -> bytes:
    # Escapes would make a text three times as long. Half a surrogate pair is no text, and fails here.
    return json.dumps(said, ensure_ascii=False).encode()


if __name__ == "__main__":
    compile_template("")  # imports what rendering needs, before memory is limited
    serve(answer, MEMORY_BYTES)
