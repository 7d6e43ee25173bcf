"""What a mixture means: names, order, weights, room; and what is refused, with the reason."""

import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.adapters.errors import InvalidMixture
from manylora.adapters.mixtures import MixturePart
from manylora.adapters.tokens import PartText
from manylora.adapters.vocabulary import TOKEN_MODULES, BaseVocabulary
from manylora.server.catalog import ResolvedPart
from manylora.server.errors import AdapterUnavailable, InvalidRequest, ModelNotFound
from tests.adapters.making import HIDDEN, VOCABULARY, factors, write
from tests.server.catalog.fakes import House


def single(value: float) -> float:
    found: float = struct.unpack("f", struct.pack("f", value))[0]
    return found


def parts(**weights: float) -> tuple[MixturePart, ...]:
    return tuple(MixturePart(name, weight) for name, weight in weights.items())


async def with_adapters(house: House, *names: str) -> list[int]:
    """Register adapters of rank 4 and return their ids."""
    found = []
    for name in names:
        seed = len(house.catalog.list())
        record, _ = await house.catalog.register(name, house.source(f"of-{seed}", seed))
        found.append(record.id)
    return found


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    house = House(tmp_path)
    yield house
    await house.leave()


async def test_a_text_of_parts_and_weights(house: House) -> None:
    sql, pirate = await with_adapters(house, "sql", "pirate")
    found = house.catalog.resolve("pirate:0.3+sql:-1.7")
    assert found.adapters == ((sql, single(-1.7)), (pirate, single(0.3)))
    assert (found.name, found.label) == ("pirate:0.3+sql:-1.7", "mixture")
    assert found.parts == (
        ResolvedPart(pirate, "pirate", 1, single(0.3)),
        ResolvedPart(sql, "sql", 1, single(-1.7)),
    )
    other = house.catalog.resolve("sql:-1.7 + pirate:0.3")
    assert other.adapters == found.adapters, "one order, however it is asked"


async def test_parts_beside_the_base(house: House) -> None:
    await with_adapters(house, "sql", "pirate")
    given = (MixturePart("sql", 0.7), MixturePart("pirate", 0.3))
    found = house.catalog.resolve("base", given)
    assert found.adapters == house.catalog.resolve("sql:0.7+pirate:0.3").adapters
    assert (found.name, found.label) == ("base", "mixture")
    for beside in ("sql", "nobody", "sql:1+pirate"):
        with pytest.raises(InvalidRequest, match="names the base, base") as caught:
            house.catalog.resolve(beside, given)
        assert caught.value.param == "adapters"
        assert beside in caught.value.message


async def test_what_is_a_name_is_that_name(house: House) -> None:
    plain, colon = await with_adapters(house, "sql", "sql:0.7")
    assert house.catalog.resolve("sql:0.7").adapters == ((colon, 1.0),)
    assert house.catalog.resolve("sql:0.7").parts == ()
    assert house.catalog.resolve("sql:0.6").adapters == ((plain, single(0.6)),)
    assert house.catalog.resolve("sql:0.7:2+sql:3").adapters == ((plain, 3.0), (colon, 2.0))


async def test_one_part_with_weight_one_is_that_adapter(house: House) -> None:
    sql, _ = await with_adapters(house, "sql", "pirate")
    plain = house.catalog.resolve("sql")
    for model in ("sql:1", "sql:1.0+pirate:0", "sql:1.000000001"):
        found = house.catalog.resolve(model)
        assert (found.adapters, found.label, found.digest) == (plain.adapters, "sql", None)
        assert found.parts[0] == ResolvedPart(sql, "sql", 1, 1.0)
    await house.catalog.register_mixture("mine", parts(sql=1))
    named = house.catalog.resolve("mine")
    assert (named.adapters, named.label) == (plain.adapters, "mine")


async def test_zeros_are_left_out(house: House) -> None:
    sql, pirate = await with_adapters(house, "sql", "pirate")
    assert house.catalog.resolve("sql:0+pirate:2").adapters == ((pirate, 2.0),)
    nothing = house.catalog.resolve("sql:0+pirate:-0")
    assert (nothing.adapters, nothing.label) == ((), "mixture")
    assert [part.adapter_id for part in nothing.parts] == [sql, pirate]
    assert house.catalog.resolve("sql:1e-60").adapters == (), "in float32 that is 0"


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("sql:0.5+sql:0.5", "'sql' is in the mixture twice"),
        ("sql+named", "part 'named' is a mixture"),
        ("named:0.5", "part 'named' is a mixture"),
        ("sql+base:0.5", "part 'base' is the base"),
        ("base:1", "part 'base' is the base"),
        ("sql:nan", "'sql'.* finite"),
        ("sql+pirate:inf", "'pirate'.* finite"),
        ("sql++pirate", "no name"),
        ("sql+a+b+c", "4 parts, at most 3"),
        ("+" * 1_000_000, "1000001 parts, at most 3"),
    ],
)
async def test_what_is_no_mixture_says_why(house: House, model: str, words: str) -> None:
    await house.catalog.close()
    house.open(max_mixture_parts=3)
    await with_adapters(house, "sql", "pirate")
    await house.catalog.register_mixture("named", parts(sql=1, pirate=2))
    with pytest.raises(InvalidMixture, match=words):
        house.catalog.resolve(model)


async def test_a_mixture_is_not_written_with_a_million_spaces(house: House) -> None:
    """What was asked is in every event of a stream."""
    first, second = "a" * 128, "b" * 128
    await with_adapters(house, first, second, *"cdefgh")
    digits = "-" + "1." + "0" * 63 + "e-0001"
    longest = " + ".join(f"{name}:{digits}" for name in (first, second, *"cdefgh"))
    assert len(house.catalog.resolve(longest).adapters) == 8
    for text in (f"c:0.5{' ' * 1_000_000}+d", f"c:0.5+{' ' * 1_000_000}d"):
        with pytest.raises(InvalidMixture, match="1000007 characters, at most 2304") as caught:
            house.catalog.resolve(text)
        assert len(caught.value.message) < 300


async def test_the_same_holds_for_parts_that_come_as_a_list_and_for_a_name_s(house: House) -> None:
    await with_adapters(house, "sql", "pirate")
    await house.catalog.register_mixture("named", parts(sql=1, pirate=2))
    wrong = [
        (MixturePart("sql", 0.5), MixturePart("sql", 0.5)),
        (MixturePart("sql", 1), MixturePart("named", 1)),
        (MixturePart("base", 1),),
        (MixturePart("sql", float("nan")),),
        (MixturePart("sql", 1e39),),
        tuple(MixturePart(f"a{number}", 1) for number in range(9)),
    ]
    for given in wrong:
        with pytest.raises(InvalidMixture):
            house.catalog.resolve("base", given)
        for door in (house.catalog.register_mixture, house.catalog.put_mixture):
            with pytest.raises(InvalidMixture):
                await door("new", given)
        with pytest.raises(InvalidMixture):
            await house.catalog.replace_mixture("named", given)
    for door in (house.catalog.register_mixture, house.catalog.put_mixture):
        with pytest.raises(InvalidMixture):
            await door("new", ())
    assert [entry.record.name for entry in house.catalog.mixtures()] == ["named"]


@pytest.mark.parametrize("model", ["llama3:latest", "llama3:8", "qwen:nan", "sql:latest", "nobody"])
async def test_an_unknown_model_is_a_plain_404(house: House, model: str) -> None:
    await with_adapters(house, "sql")
    await house.catalog.register_mixture("named", parts(sql=0.5))
    with pytest.raises(ModelNotFound, match=f"model '{model}' does not exist; models: base, named, sql"):
        house.catalog.resolve(model)


async def test_an_unknown_part_is_a_404_that_names_it(house: House) -> None:
    await with_adapters(house, "sql")
    for model in ("sql+nobody:0.5", "sql+nobody:0"):
        with pytest.raises(ModelNotFound, match="part 'nobody' does not exist; adapters: sql") as caught:
            house.catalog.resolve(model)
        assert caught.value.param == "model"
    with pytest.raises(ModelNotFound, match="part 'nobody'") as caught:
        house.catalog.resolve("base", parts(sql=1, nobody=1))
    assert caught.value.param == "adapters"
    with pytest.raises(ModelNotFound) as caught:
        house.catalog.resolve(f"sql+{'x' * 10_000}")
    assert len(caught.value.message) < 500


async def test_parts_that_never_fit_together_are_refused_with_the_numbers(house: House) -> None:
    await house.catalog.close()
    house.open(arena_rows=20)
    for name, rank in (("a", 12), ("b", 8), ("c", 9)):
        await house.catalog.register(name, house.source(name, rank, rank=rank))
    assert house.catalog.resolve("a+b").adapters
    for model in ("a+c", "a:-1+c:0.001"):
        with pytest.raises(InvalidMixture, match=r"21 rank rows .*12 \(a\) \+ 9 \(c\); the arena has 20"):
            house.catalog.resolve(model)
    with pytest.raises(InvalidMixture, match="21 rank rows"):
        await house.catalog.register_mixture("ac", parts(a=1, c=1))
    assert house.catalog.resolve("a+c:0").adapters, "what is left out takes no room"


async def test_room_is_known_after_a_restart_too(house: House) -> None:
    for name, rank in (("a", 12), ("c", 9)):
        await house.catalog.register(name, house.source(name, rank, rank=rank))
    await house.catalog.register_mixture("ac", parts(a=1, c=1))
    await house.catalog.close()
    house.open(arena_rows=20)
    report = await house.catalog.restore()
    with pytest.raises(InvalidMixture, match="21 rank rows"):
        house.catalog.resolve("a+c")
    reason = report.mixtures["ac"]
    assert reason is not None
    assert "21 rank rows" in reason
    with pytest.raises(AdapterUnavailable, match=r"mixture 'ac' can't be served: .*21 rank rows"):
        house.catalog.resolve("ac")


async def test_copies_of_the_base_s_embedding_mix_as_before_after_a_restart(house: House) -> None:
    """save_embedding_layers writes them, and what they take is known once they were read."""
    own = {name: torch.randn(VOCABULARY, HIDDEN) for name in TOKEN_MODULES}
    limits: dict[str, Any] = {
        "vocabulary": BaseVocabulary(VOCABULARY, HIDDEN, False, own.__getitem__),
        "vocabulary_bytes": 1,
    }
    await house.catalog.close()
    house.open(**limits)
    copies = {f"base_model.model.{name}.weight": rows.clone() for name, rows in own.items()}
    write(house.sources / "a", tensors={**factors(), **copies})
    for name in ("a", "b"):
        await house.catalog.register(name, name if name == "a" else house.source(name))
    for restarted in (False, True):
        if restarted:
            await house.catalog.close()
            house.open(**limits)
            await house.catalog.restore()
        assert house.catalog.resolve("a+b").adapters


async def test_a_template_that_all_have_is_the_mixture_s(house: House) -> None:
    await house.catalog.close()
    house.open(base_template="base's")
    for seed, (name, template) in enumerate(
        {"same": "base's", "none": None, "own": "T", "own-too": "T", "other": "U"}.items()
    ):
        await house.catalog.register(name, house.source(name, seed, template=template))
    assert house.catalog.resolve("own+own-too").chat_template == "T"
    assert house.catalog.resolve("own:0.5").chat_template == "T"
    assert house.catalog.resolve("none+same").chat_template is None, "the base's"
    assert house.catalog.resolve("own:0").chat_template is None
    assert house.catalog.resolve("own+other:0").chat_template == "T"
    with pytest.raises(InvalidMixture, match="'own' and 'other' have different chat templates"):
        house.catalog.resolve("own-too:0+own+other")
    with pytest.raises(InvalidMixture, match=r"different chat templates \('none' brings none"):
        house.catalog.resolve("own+none")
    with pytest.raises(InvalidMixture, match="different chat templates"):
        await house.catalog.register_mixture("both", parts(none=1, own=1))


async def test_parts_that_bring_tokens_are_compared_by_who_makes_tokens(house: House) -> None:
    asked: list[Sequence[PartText]] = []

    async def refuse(texts: Sequence[PartText]) -> None:
        asked.append(texts)
        if texts:
            raise InvalidMixture("they have different tokenizers")

    await house.catalog.close()
    house.open(check_alike=refuse)
    await with_adapters(house, "plain", "too")
    for seed, name in enumerate(("named", "alike"), 7):
        directory = house.sources / house.source(name, seed)
        (directory / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
        await house.catalog.register(name, name)
    assert house.catalog.resolve("plain+too").part_texts == ()
    alone = house.catalog.resolve("named:0.5")
    assert alone.part_texts == ()
    assert alone.digest == house.catalog.get("named").record.digest
    both = house.catalog.resolve("alike+named")
    assert [each.adapter for each in both.part_texts] == ["named", "alike"]
    assert (both.digest, both.text.special_tokens) == (alone.digest, {"eos_token": "<end>"})
    mixed = house.catalog.resolve("named+plain+too:0")
    assert [each.adapter for each in mixed.part_texts] == ["plain", "named"]
    assert (mixed.digest, mixed.text.special_tokens) == (None, {}), "the base's: it must be the same"
    with pytest.raises(InvalidMixture, match="different tokenizers"):
        await house.catalog.register_mixture("m", parts(named=1, plain=1))
    assert house.catalog.mixtures() == ()
    assert asked == [mixed.part_texts]
