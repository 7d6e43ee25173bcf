"""A worker for tests: it does what it is told, good or bad."""

import os
import sys
import time

from manylora.server.workers.child import serve


def answer(question: bytes) -> bytes:
    """Obey."""
    order, _, rest = question.decode().partition(" ")
    if order == "burn":
        end = time.monotonic() + float(rest)
        while time.monotonic() < end:
            pass
    elif order == "freeze":  # one call in C, which never looks at signals and keeps the interpreter's lock
        return str(sum(range(10**15))).encode()
    elif order == "allocate":
        try:
            return str(len(bytearray(int(rest)))).encode()
        except MemoryError:
            return b"no memory"
    elif order == "die":
        os._exit(3)
    elif order == "die_once":
        if not os.path.exists(rest):
            open(rest, "w").close()
            os._exit(3)
    elif order == "babble":
        os.write(_said, b"something that is no answer, and long enough to be read as one")
    elif order == "print":
        sys.stdout.write(rest)
        sys.stdout.flush()
    return str(os.getpid()).encode()


if __name__ == "__main__":
    _said = os.dup(1)
    serve(answer, 256 << 20)
