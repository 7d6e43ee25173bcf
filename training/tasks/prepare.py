"""From the plan to tasks that can be trained: data tokenised, one base loaded, each task's adapter on a skeleton."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import set_seed

from manylora.training.arguments import Arguments
from manylora.training.bases.load import load_base
from manylora.training.bases.lora import attach, servable
from manylora.training.bases.tokens import prepare_chat
from manylora.training.bases.types import Base
from manylora.training.errors import InvalidArgument
from manylora.training.job import total_steps
from manylora.training.preparation import Prepared, base_settings, check_files, load_sets, lora_settings
from manylora.training.rank.make import make_policy
from manylora.training.tasks.plan import Plan, Task
from manylora.training.tasks.skeleton import skeleton

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class PreparedTask:
    """A task, and what training it starts from; ``prepared.base`` is the one base."""

    task: Task
    prepared: Prepared


def prepare_tasks(plan: Plan, say: Say) -> tuple[Base, list[PreparedTask]]:
    """Do all of it, in the order in which it can fail. Raises TrainingError."""
    checks = [check_files(task.arguments, _under(task.name, say)) for task in plan.tasks]
    base = _load(plan.arguments, plan.tasks, say)
    found: list[PreparedTask] = []
    for task, check in zip(plan.tasks, checks, strict=True):
        said: list[str] = []
        tell = _under(task.name, say, said)
        arguments = task.arguments
        train, held_out = load_sets(arguments, base, tell)
        policy = make_policy(
            arguments.lora.rank_schedule, arguments.lora.lora_r, seed=arguments.training.seed
        )
        lora = replace(lora_settings(arguments), r=policy.initial_rank)
        answer = servable(base, replace(lora, r=policy.final_rank))
        tell(answer.sentence())
        # As training it alone would draw it, whichever tasks there are beside it.
        set_seed(arguments.training.seed)
        own = replace(base, model=skeleton(base.model))
        steps = total_steps(arguments.training, len(train.dataset))
        model = policy.attach(own, lora, steps) or attach(own, lora)
        prepared = Prepared(base, model, lora, policy, train, held_out, check, answer, tuple(said))
        found.append(PreparedTask(task, prepared))
    return base, found


def _load(arguments: Arguments, tasks: Sequence[Task], say: Say) -> Base:
    settings = base_settings(arguments)
    longest = max(task.arguments.training.model_max_length for task in tasks)
    base = load_base(replace(settings, model_max_length=longest))
    chat = prepare_chat(base)
    if chat.new_tokens:
        raise InvalidArgument(
            f"{base.name} has no tokens for conversations ({', '.join(chat.new_tokens)}), and training their"
            " embeddings would change the base that all tasks share: take a chat model, or train one adapter alone"
        )
    for note in (*base.notes, *chat.notes):
        say(note)
    return base


def _under(name: str, say: Say, said: list[str] | None = None) -> Say:
    """Return what says a sentence under a task's name, and keeps it."""

    def tell(sentence: str) -> None:
        if said is not None:
            said.append(sentence)
        say(f"{name}: {sentence}")

    return tell
