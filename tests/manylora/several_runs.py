"""Runs several commands one after the other in the processes that torchrun started: importing torch takes longest.

Not a test. Takes a file with a JSON list of lists of words; says how each ended. A traceback in one of them ends all.
"""

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path

from manylora.training.bases.types import Base
from manylora.training.errors import TrainingError
from manylora.training.evaluate.generate import Generate
from manylora.training.parsing import parse_arguments
from manylora.training.quiet import quiet_libraries
from manylora.training.run import Surroundings, train


def say(sentence: str) -> None:
    """Write a line."""
    sys.stderr.write(f"· {sentence}\n")
    sys.stderr.flush()


def no_server(_: Base) -> AbstractContextManager[Generate]:
    """Refuse to answer."""
    raise AssertionError("nobody asked for answers")


def main() -> None:
    """Run what the file says."""
    quiet_libraries()
    for words in json.loads(Path(sys.argv[1]).read_text()):
        end = "is done"
        try:
            train(parse_arguments(words), Surroundings(say, no_server))
        except TrainingError as error:
            end = f"ended: {error}"
        say(f"process {os.environ['RANK']} {end}: {' '.join(words)}")


if __name__ == "__main__":
    main()
