"""Requests while adapters come and go: each is answered by what its model meant when it came, and by nothing else."""

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

from manylora.adapters.errors import InvalidMixture
from manylora.loadtest.checks.bars.walk_house import BASE, MAX_TOKENS, greedy
from manylora.loadtest.checks.life.house import House
from manylora.loadtest.checks.life.operations import MIXTURES, NAMES, draw_parts
from manylora.loadtest.checks.life.truth import Name, Refused, Truth, must
from manylora.server.engine.request import FinishReason, GenerationRequest
from manylora.server.errors import AdapterUnavailable, ModelNotFound

PROMPTS, USERS = 3, 12
AT_ONCE = 12
"""Requests under way, at most."""
WAIT_SECONDS = 120.0
Meaning = list[tuple[str, int, float]]
"""(name, version, weight) of all parts."""


@dataclass(slots=True)
class Asking:
    """Whoever asks."""

    house: House
    rng: random.Random
    counts: Counter[str]
    ids: dict[int, tuple[str, int, str]]
    running: set[asyncio.Task[None]] = field(default_factory=set)
    ended: list[asyncio.Task[None]] = field(default_factory=list)
    asked: int = 0
    _near: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    """Of each user with each name: the largest share at which it got the active version, the least at which the
    canary. Who gets a canary at one share gets it at every larger one."""

    async def rest(self) -> None:
        """Wait until all are answered. Raises what they met."""
        if self.running:
            _, late = await asyncio.wait(self.running, timeout=WAIT_SECONDS)
            must(not late, f"{len(late)} requests never ended")
        for task in self.ended:
            task.result()
        self.ended.clear()

    async def ask(self, truth: Truth) -> None:
        """Ask for the base, an adapter, a version or a mixture; go on while it answers."""
        while len(self.running) >= AT_ONCE:
            await asyncio.wait(self.running, return_when=asyncio.FIRST_COMPLETED)
        model, user = self._model(truth), f"user {self.rng.randrange(USERS)}"
        try:
            right = self._meaning(truth, model)
        except Refused:
            right = None
        try:
            found = self.house.catalog.resolve(model, asker=user)
        except (ModelNotFound, AdapterUnavailable, InvalidMixture) as error:
            must(right is None, f"{model}: {error}")
            self.counts["not there"] += 1
            return
        must(right is not None, f"{model} means {found.adapters}, but is not there")
        given = [(*self.ids[adapter_id][:2], weight) for adapter_id, weight in found.adapters]
        name = truth.names.get(model)
        if name is not None and name.canary is not None:
            self._hold_share(model, name, user, given[0][1])
        else:
            must(sorted(given) == sorted(right or ()), f"{model} means {given}, not {right}")
        self._begin(found.adapters, found.label)
        await asyncio.sleep(self.rng.choice((0, 0, 0.002)))

    def _model(self, truth: Truth) -> str:
        name = self.rng.choice(NAMES)
        match self.rng.randrange(7):
            case 0:
                return BASE
            case 1 | 2:
                return name
            case 3:
                return f"{name}@{self.rng.randint(1, truth.last.get(name, 0) + 1)}"
            case 4:
                return self.rng.choice(MIXTURES)
        return "+".join(f"{text}:{weight}" for text, weight in draw_parts(self.rng, truth))

    def _meaning(self, truth: Truth, model: str) -> Meaning:
        """Return what a model means; of a name with a canary the active version. Raises Refused."""
        if model == BASE:
            return []
        if model in truth.mixtures:
            return truth.meaning(truth.mixtures[model])
        if "+" not in model and not model.endswith((":0.5", ":1.0")):
            return [(*truth.part(model), 1.0)]
        parts = [piece.rpartition(":") for piece in model.split("+")]
        return truth.meaning(tuple((text, float(weight)) for text, _, weight in parts))

    def _hold_share(self, model: str, name: Name, user: str, version: int) -> None:
        """Hold who gets the canary against who got it before."""
        must(version in (name.active, name.canary), f"{model} was answered by version {version}")
        most, least = self._near.get((model, user), (-1.0, 2.0))
        if version == name.canary:
            least = min(least, name.share)
            self.counts["answered by a canary"] += 1
        else:
            most = max(most, name.share)
        must(most < least, f"{user} gets the canary of {model} at {least}, and not at {most}")
        must(version == (name.canary if name.share == 1 else version), f"{model}: a share of 1 is everybody")
        must(version == (name.active if name.share == 0 else version), f"{model}: a share of 0 is nobody")
        self._near[model, user] = (most, least)

    def _begin(self, adapters: tuple[tuple[int, float], ...], label: str) -> None:
        self.asked += 1
        prompt = tuple(random.Random(self.rng.randrange(PROMPTS)).choices(range(300), k=17))
        request = GenerationRequest(str(self.asked), prompt, greedy(), adapters, label)
        task = asyncio.create_task(self._read(request, self.rng.choice((None, None, None, 0, 3))))
        self.running.add(task)
        task.add_done_callback(self._end)

    def _end(self, task: asyncio.Task[None]) -> None:
        self.running.discard(task)
        self.ended.append(task)

    async def _read(self, request: GenerationRequest, leave_after: int | None) -> None:
        parts = tuple((self.ids[adapter_id][2], weight) for adapter_id, weight in request.adapters)
        right = self.house.rig.oracle.tokens(parts, request.prompt_token_ids)
        try:
            stream = self.house.engine.submit(request)
        except ModelNotFound:  # it was let go between the look-up and this: who asks by HTTP looks again
            self.counts["gone at the door"] += 1
            return
        got: list[int] = []
        if leave_after == 0:
            stream.abort()
        async for outputs in stream:
            for output in outputs:
                got += output.token_ids
                must(got == right[: len(got)], f"{parts} answers {got}, not {right}")
                match output.finish_reason:
                    case FinishReason.LENGTH:
                        must(len(got) == MAX_TOKENS, f"an answer of {len(got)} tokens")
                        self.counts["whole answers"] += 1
                    case FinishReason.ABORTED:
                        must(leave_after is not None, "a request was aborted by nobody")
                    case FinishReason.FAILED:
                        must(False, f"failed: {output.error!r}")
            if leave_after is not None and len(got) >= leave_after:
                stream.abort()
