"""What a demo adapter that calls functions learns from and is held by: whole conversations of one to three exchanges.

An exchange is a question and its answer: one call, two at once, two one after the other, or a sentence that says that
no function does what is asked.
"""

import random
from dataclasses import dataclass

from manylora.demo.calls import Conversation, Errand, Function, Message, Want, draw_errand, draw_functions
from manylora.demo.examples import SYSTEM_PROMPTS
from manylora.demo.forms import plain
from manylora.demo.tables import draw_question, draw_table

SYSTEMS = (*SYSTEM_PROMPTS, "Use the functions.", "You are an assistant that calls functions.")
BOTH = ("What is the {0} and the {1}?", "Tell me the {0} and the {1}.", "I need the {0} and the {1}.")


@dataclass(frozen=True)
class Exchange:
    """A question with what it needs, and what is said to it, call by call."""

    errands: tuple[Errand, ...]
    fits: bool
    """Whether there are functions for it."""
    at_once: bool = True
    """Whether two functions are called in one turn."""

    @property
    def text(self) -> str:
        """The user's words."""
        if len(self.errands) == 1:
            return self.errands[0].text
        return BOTH[len(self.errands[0].text) % len(BOTH)].format(*(each.subject for each in self.errands))

    @property
    def answer(self) -> str:
        """The assistant's last words."""
        if not self.fits:
            return self.errands[0].refusal
        return " ".join(each.answer for each in self.errands)

    def messages(self, functions: dict[Want, Function], number: int) -> list[Message]:
        """The turns; `number` is that of the first call."""
        turns: list[Message] = [{"role": "user", "content": self.text}]
        if self.fits:
            groups = [self.errands] if self.at_once else [(each,) for each in self.errands]
            for place, group in enumerate(groups):
                calls = [
                    functions[each.want].call(number + place + index, *each.values)
                    for index, each in enumerate(group)
                ]
                # Called one by one only where it must be: that the first comes alone isn't to be learnt.
                alone = {"weight": 0} if len(groups) > 1 and place == 0 else {}
                turns.append({"role": "assistant", "content": None, "tool_calls": calls, **alone})
                turns += [
                    {"role": "tool", "tool_call_id": call["id"], "content": each.result}
                    for call, each in zip(calls, group, strict=True)
                ]
        return [*turns, {"role": "assistant", "content": self.answer}]


def draw_exchange(rng: random.Random, *, held_out: bool = False) -> Exchange:
    """A question for one function, now and then for two or none."""
    first = draw_errand(rng, held_out=held_out)
    if rng.random() < 0.2:
        return Exchange((first,), fits=False)
    if first.want.changes or rng.random() < 0.7:
        return Exchange((first,), fits=True)
    while True:
        second = draw_errand(rng, held_out=held_out)
        if not second.want.changes and second.subject != first.subject:
            return Exchange((first, second), fits=True, at_once=rng.random() < 0.8)


def draw_exchanges(
    rng: random.Random, count: int, *, held_out: bool = False
) -> tuple[dict[Want, Function], tuple[Exchange, ...]]:
    """Questions of one conversation, and the functions that it offers."""
    while True:
        exchanges = tuple(draw_exchange(rng, held_out=held_out) for _ in range(count))
        needed = {each.want: None for one in exchanges if one.fits for each in one.errands}
        absent = {each.want: None for one in exchanges if not one.fits for each in one.errands}
        if not {want.gives for want in needed} & {want.gives for want in absent}:
            return draw_functions(rng, tuple(needed), tuple(absent)), exchanges


def draw_conversation(rng: random.Random) -> Conversation:
    """One to train on."""
    messages: list[Message] = []
    if rng.random() < 0.3:
        messages.append({"role": "system", "content": rng.choice(SYSTEMS)})
    if rng.random() < 0.08:  # without functions it is to answer as the base does
        question = draw_question(rng, draw_table(rng))
        said = {"role": "assistant", "content": plain(question)}
        return Conversation((), (*messages, {"role": "user", "content": question.prompt}, said))
    functions, exchanges = draw_exchanges(rng, 2 if rng.random() < 0.1 else 1)
    for place, exchange in enumerate(exchanges):
        messages += exchange.messages(functions, 2 * place)
    return Conversation(tuple(each.tool for each in functions.values()), tuple(messages))
