"""Random walks over adapters and mixtures, against a model of what every name must mean at every moment."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from manylora.adapters.errors import AdapterNameTaken, InvalidMixture, UnknownAdapter
from manylora.adapters.mixtures import MixturePart, spell
from manylora.server.errors import AdapterUnavailable, ModelNotFound
from tests.server.catalog.fakes import House

NAMES = ("a", "b", "c", "d", "a:1")
WEIGHTS = (-1.5, 0.0, 0.25, 1.0, 3.0)
SOURCES = 4
Step = Callable[[], Coroutine[object, object, None]]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    for seed in range(SOURCES):
        house.source(f"s{seed}", seed)
    yield house
    await house.leave()


@dataclass
class Walk:
    """What was done so far, and what must hold after it."""

    house: House
    choose: random.Random
    adapters: dict[str, int] = field(default_factory=dict)
    """Names to ids."""
    mixtures: dict[str, tuple[MixturePart, ...]] = field(default_factory=dict)

    def parts(self) -> tuple[MixturePart, ...]:
        names = self.choose.sample(NAMES, self.choose.randint(1, 3))
        return tuple(MixturePart(name, self.choose.choice(WEIGHTS)) for name in names)

    def meaning(self, parts: tuple[MixturePart, ...]) -> type[Exception] | tuple[tuple[int, float], ...]:
        """Return what a mixture must mean now, or how it must fail."""
        for part in parts:
            if part.adapter in self.mixtures:
                return InvalidMixture
            if part.adapter not in self.adapters:
                return ModelNotFound
        ids = [(self.adapters[part.adapter], part.weight) for part in parts]
        return tuple(sorted(each for each in ids if each[1] != 0))

    async def put(self) -> None:
        name, source = self.choose.choice(NAMES), f"s{self.choose.randrange(SOURCES)}"
        if name in self.mixtures:
            with pytest.raises(AdapterNameTaken):
                await self.house.catalog.put(name, source)
            return
        self.adapters[name] = (await self.house.catalog.put(name, source)).record.id

    async def delete(self) -> None:
        name = self.choose.choice(NAMES)
        if self.adapters.pop(name, None) is None:
            with pytest.raises(UnknownAdapter):
                await self.house.catalog.delete(name)
            return
        await self.house.catalog.delete(name)

    async def mix(self) -> None:
        name, parts = self.choose.choice(NAMES), self.parts()
        meaning = self.meaning(parts)
        if name in self.adapters:
            meaning = AdapterNameTaken
        elif self.mixtures.get(name) == parts:
            meaning = ()
        if isinstance(meaning, type):
            with pytest.raises(meaning):
                await self.house.catalog.put_mixture(name, parts)
            return
        await self.house.catalog.put_mixture(name, parts)
        self.mixtures[name] = parts

    async def unmix(self) -> None:
        name = self.choose.choice(NAMES)
        if self.mixtures.pop(name, None) is None:
            with pytest.raises(UnknownAdapter):
                await self.house.catalog.delete_mixture(name)
            return
        await self.house.catalog.delete_mixture(name)

    async def leave_early(self) -> None:
        """A client hangs up at some moment; then either all of it was done or nothing."""
        name, parts = self.choose.choice(NAMES), self.parts()
        task = asyncio.create_task(self.house.catalog.put_mixture(name, parts))
        for _ in range(self.choose.randrange(4)):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await self.house.catalog.settled()
        found = self.house.catalog.get_mixture(name)
        if found is not None and found.record.parts == parts:
            self.mixtures[name] = parts

    async def restart(self) -> None:
        await self.house.catalog.settled()
        self.house.kill()
        self.house.open()
        await self.house.catalog.restore()

    def check(self) -> None:
        """Every name, and some texts, mean what they must."""
        catalog = self.house.catalog
        assert {entry.record.name: entry.record.id for entry in catalog.list()} == self.adapters
        assert {entry.record.name: entry.record.parts for entry in catalog.mixtures()} == self.mixtures
        for entry in catalog.mixtures():
            meaning = self.meaning(entry.record.parts)
            assert (entry.reason is None) is isinstance(meaning, tuple)
            self._check_means(entry.record.name, AdapterUnavailable if isinstance(meaning, type) else meaning)
        parts = self.parts()
        self._check_means("base", self.meaning(parts), parts)
        if not any(catalog.kind_of(each) for each in spell(parts).split("+")):  # "a:1" may be a name
            self._check_means(spell(parts), self.meaning(parts))

    def _check_means(
        self,
        model: str,
        meaning: type[Exception] | tuple[tuple[int, float], ...],
        parts: tuple[MixturePart, ...] = (),
    ) -> None:
        if isinstance(meaning, type):
            with pytest.raises(meaning):
                self.house.catalog.resolve(model, parts)
        else:
            assert self.house.catalog.resolve(model, parts).adapters == meaning


@pytest.mark.parametrize("seed", range(4))
async def test_no_name_ever_means_what_it_must_not(house: House, seed: int) -> None:
    walk = Walk(house, random.Random(seed))
    steps: list[Step] = [walk.put, walk.delete, walk.mix, walk.unmix, walk.leave_early, walk.restart]
    for _ in range(150):
        [step] = walk.choose.choices(steps, weights=[4, 2, 4, 1, 2, 0.3])
        await step()
        walk.check()
    await house.catalog.settled()
    house.check()
