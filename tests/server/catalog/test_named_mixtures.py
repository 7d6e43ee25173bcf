"""Mixtures with names: made, changed, deleted, restored; they follow their parts, and no name means two things."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from manylora.adapters.errors import (
    AdapterNameTaken,
    InvalidAdapter,
    InvalidMixture,
    RegistryBusy,
    UnknownAdapter,
)
from manylora.adapters.mixture_registry import MixtureRegistry
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.tokens import PartText
from manylora.server.catalog import ResolvedPart
from manylora.server.errors import AdapterUnavailable, ModelNotFound, ShuttingDown
from tests.server.catalog.fakes import SECONDS, House


def parts(**weights: float) -> tuple[MixturePart, ...]:
    return tuple(MixturePart(name, weight) for name, weight in weights.items())


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    for seed, name in enumerate(("sql", "pirate")):
        await house.catalog.register(name, house.source(name, seed))
    yield house
    await house.leave()


async def test_a_name_means_its_parts(house: House) -> None:
    entry, is_new = await house.catalog.register_mixture("sailor", parts(pirate=0.5, sql=2))
    assert is_new
    assert entry == house.catalog.get_mixture("sailor")
    assert (entry.record.name, entry.record.version, entry.reason) == ("sailor", 1, None)
    sql, pirate = house.id_of("sql"), house.id_of("pirate")
    assert entry.parts == (ResolvedPart(pirate, "pirate", 1, 0.5), ResolvedPart(sql, "sql", 1, 2.0))
    found = house.catalog.resolve("sailor")
    assert found.adapters == house.catalog.resolve("sql:2+pirate:0.5").adapters
    assert (found.name, found.label, found.parts) == ("sailor", "sailor", entry.parts)
    assert {name: house.catalog.kind_of(name) for name in ("base", "sql", "sailor", "nobody")} == {
        "base": "base",
        "sql": "adapter",
        "sailor": "mixture",
        "nobody": None,
    }
    assert house.catalog.get_mixture("sql") is None
    assert [each.record.name for each in house.catalog.list()] == ["pirate", "sql"]


async def test_the_same_parts_again_are_the_same_mixture(house: House) -> None:
    first, _ = await house.catalog.register_mixture("sailor", parts(sql=0.7, pirate=0.3))
    assert await house.catalog.register_mixture("sailor", parts(sql=0.7, pirate=0.3)) == (first, False)
    assert await house.catalog.register_mixture("sailor", parts(pirate=0.3, sql=0.7)) == (first, False)
    assert await house.catalog.put_mixture("sailor", parts(sql=0.7, pirate=0.3)) == (first, False)
    with pytest.raises(AdapterNameTaken, match=r"exists as sql:0\.7\+pirate:0\.3; replace it"):
        await house.catalog.register_mixture("sailor", parts(sql=0.7, pirate=0.4))
    second, is_new = await house.catalog.put_mixture("sailor", parts(sql=0.7, pirate=0.4))
    assert is_new
    assert (second.record.version, second.record.id) == (2, first.record.id + 1)


async def test_the_same_parts_again_are_taken_when_a_part_is_gone(house: House) -> None:
    """A start with --mixture is no less good than one without, and says what is missing."""
    await house.catalog.register_mixture("sailor", parts(sql=0.7, pirate=0.3))
    await house.catalog.delete("sql")
    again, is_new = await house.catalog.put_mixture("sailor", parts(sql=0.7, pirate=0.3))
    assert not is_new
    assert again.reason is not None


async def test_parts_and_weights_change_while_it_serves(house: House) -> None:
    with pytest.raises(UnknownAdapter, match="no mixture 'sailor'; mixtures: none"):
        await house.catalog.replace_mixture("sailor", parts(sql=1))
    with pytest.raises(UnknownAdapter, match="no mixture 'sql'"):
        await house.catalog.delete_mixture("sql")
    await house.catalog.register_mixture("sailor", parts(sql=0.5))
    before = house.catalog.resolve("sailor")
    entry = await house.catalog.replace_mixture("sailor", parts(sql=0.5, pirate=-1))
    assert entry.record.version == 2
    assert house.catalog.resolve("sailor").adapters != before.adapters
    deleted = await house.catalog.delete_mixture("sailor")
    assert deleted.name == "sailor"
    with pytest.raises(ModelNotFound, match="model 'sailor' does not exist"):
        house.catalog.resolve("sailor")
    assert house.engine.held.keys() == {house.id_of("sql"), house.id_of("pirate")}, "its parts stay"
    again, _ = await house.catalog.register_mixture("sailor", parts(sql=0.5))
    assert again.record.version == 3


async def test_it_follows_its_parts(house: House) -> None:
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    before = house.catalog.resolve("sailor")
    new = await house.catalog.replace("sql", house.source("sql-2", 5))
    after = house.catalog.resolve("sailor")
    assert after.adapters == ((house.id_of("pirate"), 0.5), (new.id, 0.5)) != before.adapters
    assert after.parts[0] == ResolvedPart(new.id, "sql", 2, 0.5)
    await house.catalog.delete("sql")
    with pytest.raises(
        AdapterUnavailable, match="mixture 'sailor' can't be served: part 'sql' does not exist"
    ):
        house.catalog.resolve("sailor")
    entry = house.catalog.get_mixture("sailor")
    assert entry is not None
    assert entry.reason is not None
    assert "part 'sql' does not exist" in entry.reason
    assert entry.parts == (MixturePart("sql", 0.5), after.parts[1])
    back, _ = await house.catalog.register("sql", "sql")
    assert house.catalog.resolve("sailor").adapters == ((house.id_of("pirate"), 0.5), (back.id, 0.5))
    assert house.catalog.mixtures()[0].reason is None


async def test_a_name_that_comes_back_as_a_mixture_heals_nothing(house: House) -> None:
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    await house.catalog.delete("sql")
    await house.catalog.register_mixture("sql", parts(pirate=2))
    with pytest.raises(AdapterUnavailable, match="'sailor' can't be served: part 'sql' is a mixture"):
        house.catalog.resolve("sailor")


async def test_a_part_that_no_longer_goes_with_the_others_makes_it_unavailable(house: House) -> None:
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    await house.catalog.replace("sql", house.source("sql-2", 5, template="T"))
    with pytest.raises(AdapterUnavailable, match="different chat templates"):
        house.catalog.resolve("sailor")


async def test_a_part_that_is_tokenised_otherwise_makes_it_unavailable_before_anybody_asks(
    house: House,
) -> None:
    asked = 0

    async def refuse(texts: Sequence[PartText]) -> None:
        nonlocal asked
        asked += bool(texts)
        if len({tuple(each.text.special_tokens.items()) for each in texts}) > 1:
            raise InvalidMixture(f"{texts[0].adapter} and {texts[1].adapter} have different tokenizers")

    await house.catalog.close()
    house.open(check_alike=refuse)
    await house.catalog.restore()
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    await house.catalog.register_mixture("alone", parts(pirate=0.5))
    for seed, end in ((5, "<end>"), (6, "<stop>")):
        directory = house.sources / house.source(f"other-{seed}", seed)
        (directory / "tokenizer_config.json").write_text(f'{{"eos_token": "{end}"}}')
    await house.catalog.replace("sql", "other-5")
    await house.catalog.settled()
    for _ in range(2):
        entries = {entry.record.name: entry.reason for entry in house.catalog.mixtures()}
        assert entries == {"sailor": "pirate and sql have different tokenizers", "alone": None}
        with pytest.raises(AdapterUnavailable, match=r"'sailor' can't be served: .* different tokenizers"):
            house.catalog.resolve("sailor")
        await house.catalog.close()
        house.open(check_alike=refuse)
        await house.catalog.restore()
        await house.catalog.settled()
    asked = 0
    await house.catalog.replace("sql", "sql")
    await house.catalog.settled()
    assert len(house.catalog.resolve("sailor").adapters) == 2
    assert asked == 0, "neither brings tokens: there is nothing to load"


@pytest.mark.parametrize("how", ["roll_back", "promote"])
async def test_a_version_that_takes_over_and_is_tokenised_otherwise_makes_it_unavailable_too(
    house: House, how: str
) -> None:
    async def refuse(texts: Sequence[PartText]) -> None:
        if len({tuple(each.text.special_tokens.items()) for each in texts}) > 1:
            raise InvalidMixture("different tokenizers")

    await house.catalog.close()
    house.open(check_alike=refuse, keep_versions=2)
    await house.catalog.restore()
    directory = house.sources / house.source("other", 5)
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    if how == "roll_back":
        await house.catalog.replace("sql", "other")
        await house.catalog.replace("sql", house.source("sql-2", 6))
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    if how == "promote":
        await house.catalog.try_source("sql", "other", 0.5)
    await house.catalog.settled()
    assert [entry.reason for entry in house.catalog.mixtures()] == [None]
    await getattr(house.catalog, how)("sql")
    await house.catalog.settled()
    assert [entry.reason for entry in house.catalog.mixtures()] == ["different tokenizers"]


async def test_it_is_there_again_after_a_restart(house: House) -> None:
    made, _ = await house.catalog.register_mixture("sailor", parts(sql=0.1, pirate=0.3))
    await house.catalog.register_mixture("gone", parts(sql=1))
    await house.catalog.delete_mixture("gone")
    house.kill()
    house.open()
    report = await house.catalog.restore()
    assert report.mixtures == {"sailor": None}
    assert house.catalog.mixtures() == (made,)
    assert house.catalog.resolve("sailor").adapters == (
        (1, made.record.parts[0].weight),
        (2, made.record.parts[1].weight),
    )


async def test_a_part_damaged_on_disk_makes_it_unavailable_until_that_is_healed(house: House) -> None:
    await house.catalog.register_mixture("sailor", parts(sql=0.5, pirate=0.5))
    digest = house.catalog.get("sql").record.digest
    await house.catalog.close()
    (house.store.path_of(digest) / "adapter_model.safetensors").unlink()
    house.open(arena_rows=8)
    report = await house.catalog.restore()
    reason = report.mixtures["sailor"]
    assert reason is not None
    assert reason.startswith("part 'sql' can't be served: ")
    for model in ("sailor", "sql:0.5+pirate"):
        with pytest.raises(AdapterUnavailable, match="part 'sql' can't be served"):
            house.catalog.resolve(model)
    with pytest.raises(AdapterUnavailable, match="part 'sql'"):
        await house.catalog.register_mixture("new", parts(sql=1))
    await house.catalog.register("sql", "sql")
    assert len(house.catalog.resolve("sailor").adapters) == 2
    await house.catalog.register("larger", house.source("larger", 9, rank=5))
    with pytest.raises(InvalidMixture, match="9 rank rows"):
        house.catalog.resolve("sql+larger")


async def test_a_name_means_one_thing(house: House) -> None:
    with pytest.raises(AdapterNameTaken, match="'sql' is an adapter"):
        await house.catalog.register_mixture("sql", parts(pirate=1))
    with pytest.raises(AdapterNameTaken, match="'sql' is an adapter"):
        await house.catalog.put_mixture("sql", parts(pirate=1))
    await house.catalog.register_mixture("sailor", parts(sql=0.5))
    for door in (house.catalog.register, house.catalog.replace, house.catalog.put):
        with pytest.raises(AdapterNameTaken, match="'sailor' is a mixture"):
            await door("sailor", "sql")
    with pytest.raises(UnknownAdapter):
        await house.catalog.delete("sailor")
    for name in ("base", "a b", "", "a+b"):
        with pytest.raises(InvalidAdapter):
            await house.catalog.register_mixture(name, parts(sql=0.5))
    await house.catalog.delete_mixture("sailor")
    await house.catalog.register("sailor", "sql")


async def test_a_mixture_and_an_adapter_that_want_one_name_at_once(house: House) -> None:
    house.engine.adding.close()
    adapter = asyncio.create_task(house.catalog.register("both", house.source("both", 9)))
    await house.engine.adding.reached()
    mixture = asyncio.create_task(house.catalog.register_mixture("both", parts(sql=0.5)))
    await asyncio.sleep(0)
    house.engine.adding.open()
    async with asyncio.timeout(SECONDS):
        await adapter
        with pytest.raises(AdapterNameTaken):
            await mixture
    racing = [
        house.catalog.register("third", "both"),
        house.catalog.register_mixture("third", parts(sql=0.5)),
        house.catalog.put("third", "sql"),
        house.catalog.put_mixture("third", parts(sql=0.25)),
    ]
    results = await asyncio.gather(*racing, return_exceptions=True)
    assert all(not isinstance(each, BaseException) or type(each) is AdapterNameTaken for each in results)
    assert house.catalog.kind_of("third") is not None


async def test_an_unknown_part_is_refused_by_name(house: House) -> None:
    for door in (house.catalog.register_mixture, house.catalog.put_mixture):
        with pytest.raises(ModelNotFound, match="part 'nobody' does not exist"):
            await door("sailor", parts(sql=1, nobody=1))
    assert house.catalog.mixtures() == ()


async def test_a_registry_that_fails_changes_nothing(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = await house.catalog.register_mixture("sailor", parts(sql=0.5))

    def busy(*_: object) -> None:
        raise RegistryBusy("locked")

    for method in ("create", "replace", "retire"):
        monkeypatch.setattr(MixtureRegistry, method, busy)
    with pytest.raises(RegistryBusy):
        await house.catalog.register_mixture("other", parts(sql=1))
    with pytest.raises(RegistryBusy):
        await house.catalog.replace_mixture("sailor", parts(sql=1))
    with pytest.raises(RegistryBusy):
        await house.catalog.delete_mixture("sailor")
    assert house.catalog.mixtures() == (made,)
    assert house.catalog.resolve("sailor").adapters == ((house.id_of("sql"), 0.5),)


async def test_a_caller_that_leaves_finds_all_or_nothing(house: House) -> None:
    for _ in range(20):
        task = asyncio.create_task(house.catalog.register_mixture("sailor", parts(sql=0.5)))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await house.catalog.settled()
        house.check()
        if house.catalog.get_mixture("sailor"):
            await house.catalog.delete_mixture("sailor")


async def test_closing_refuses_changes_to_mixtures(house: House) -> None:
    await house.catalog.close()
    with pytest.raises(ShuttingDown):
        await house.catalog.register_mixture("sailor", parts(sql=0.5))
    with pytest.raises(ShuttingDown):
        await house.catalog.delete_mixture("sailor")
    house.open()
    await house.catalog.restore()


async def test_what_only_adapters_have_is_not_looked_for_in_a_mixture(house: House) -> None:
    await house.catalog.register_mixture("sailor", parts(sql=0.7, pirate=0.3))
    with pytest.raises(UnknownAdapter, match="'sailor' is a mixture"):
        await house.catalog.roll_back("sailor")
    with pytest.raises(UnknownAdapter, match="'sailor' is a mixture"):
        house.catalog.versions("sailor")
