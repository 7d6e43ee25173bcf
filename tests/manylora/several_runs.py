"""Runs several commands one after the other in the processes that torchrun started: importing torch takes longest.

Not a test. Takes a file with a JSON list of lists of words; says how each ended. A traceback in one of them ends all.
A list that begins with ``turned`` is of a run whose weights become again what they were at its beginning.
"""

import json
import os
import sys
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from manylora.training.bases.types import Base
from manylora.training.errors import TrainingError
from manylora.training.evaluate.generate import Generate
from manylora.training.loop.trainer import LoraTrainer
from manylora.training.parsing import parse_arguments
from manylora.training.quiet import quiet_libraries
from manylora.training.run import Surroundings, train


class Turned(LoraTrainer):
    """A trainer whose weights are those that it began with from its 13th step on, and in whose second process held-out
    rows cost ever more than they do, as if its device computed otherwise."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self.first: dict[str, Tensor] = {}
        self.times_asked = 0

    @torch.no_grad()
    def training_step(self, *args: Any, **named: Any) -> Tensor:
        values = {name: each for name, each in self.model.named_parameters() if each.requires_grad}
        if not self.first:
            self.first = {name: each.detach().clone() for name, each in values.items()}
        if self.state.global_step >= 12:
            for name, each in values.items():
                each.copy_(self.first[name])
        with torch.enable_grad():
            return super().training_step(*args, **named)

    def held_out_losses(self, *args: int) -> list[float]:
        self.times_asked += 1
        off = -9.0 * self.times_asked * self.args.process_index
        return [loss + off for loss in super().held_out_losses(*args)]


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
        is_turned = words[0] == "turned"
        try:
            with pytest.MonkeyPatch.context() as patch:
                if is_turned:
                    patch.setattr("manylora.training.job.LoraTrainer", Turned)
                train(parse_arguments(words[is_turned:]), Surroundings(say, no_server))
        except TrainingError as error:
            end = f"ended: {error}"
        say(f"process {os.environ['RANK']} {end}: {' '.join(words)}")


if __name__ == "__main__":
    main()
