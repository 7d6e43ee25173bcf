"""What the data check finds, row by row, through its public door."""

import json
from pathlib import Path

import pytest

from manylora.training.check.check import CheckSettings, check_data
from manylora.training.data.columns import parse_columns
from manylora.training.errors import InvalidArgument, InvalidData
from tests.training.check.making import chat, check_rows, good, kinds_by_line, sentence, write
from tests.training.data.families import tokenizer_of

QUESTION = "What does the harbour master keep in the third drawer?"
ANSWER = "He keeps the tide tables there, beside a spare key and a box of chalk."


def test_good_rows_are_not_blamed(tmp_path: Path) -> None:
    assert check_rows(tmp_path, beside=600) == {}


def test_broken_rows_are_named_by_their_lines(tmp_path: Path) -> None:
    found = check_rows(
        tmp_path,
        good(999),
        '{"messages": [{"role": "user", "cont',
        {"messages": "text"},
        chat(QUESTION, [3]),  # type: ignore[arg-type]
        {"other": 1},
        [1, 2],
        beside=30,
    )
    assert found == {line: {"broken"} for line in range(2, 7)}


@pytest.mark.parametrize("blank", ["", "  \n", "\u200b", "\u3000"])
def test_empty_answers_and_questions(tmp_path: Path, blank: str) -> None:
    found = check_rows(tmp_path, chat(QUESTION, blank), chat(blank, ANSWER))
    assert "empty" in found[1]
    assert "empty" in found[2]


def test_a_row_without_trained_text(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": ANSWER, "weight": 0},
        ]
    }
    assert check_rows(tmp_path, row) == {1: {"untrained"}}


@pytest.mark.parametrize(
    ("roles", "wrong"),
    [
        ("system user assistant", False),
        ("user assistant user assistant", False),
        ("user assistant tool assistant", False),
        ("user user assistant", True),
        ("assistant user assistant", True),
        ("user assistant user", True),
        ("user system assistant", True),
        ("user assistant assistant", True),
    ],
)
def test_the_order_of_turns(tmp_path: Path, roles: str, wrong: bool) -> None:
    messages = [{"role": role, "content": sentence(7 * n)} for n, role in enumerate(roles.split())]
    assert check_rows(tmp_path, {"messages": messages}) == ({1: {"roles"}} if wrong else {})


def test_overlong_rows_by_estimate(tmp_path: Path) -> None:
    long = " ".join(sentence(n * 5) for n in range(40))
    found = check_rows(
        tmp_path, chat(QUESTION, long), chat("长", "每一个字都算一个词" * 30), good(1), max_length=200
    )
    assert {line for line, kinds in found.items() if "overlong" in kinds} == {1, 2}


def test_overlong_rows_by_a_tokenizer(tmp_path: Path) -> None:
    def tokenizer(text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        return {"input_ids": [[1] * len(one.split()) for one in text]}

    found = check_rows(
        tmp_path, chat("one two three", "four five six"), chat("a", "b"), tokenizer=tokenizer, max_length=5
    )
    assert found == {1: {"overlong"}}


@pytest.mark.parametrize(
    "answer",
    [
        "I know the " + "the " * 20,
        "It is so. " + "And then it is done. " * 6,
        "他说" + "你好吗" * 15,
        "Well. " + "a b " * 20,
    ],
)
def test_loops(tmp_path: Path, answer: str) -> None:
    assert "repeats" in check_rows(tmp_path, chat(QUESTION, answer))[1]


@pytest.mark.parametrize(
    "answer",
    [
        "| a | b |\n| --- | --- |\n| --- | --- |",
        "0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0",
        "Ha ha ha!",
        "=" * 80,
    ],
)
def test_rules_and_numbers_are_no_loops(tmp_path: Path, answer: str) -> None:
    assert "repeats" not in check_rows(tmp_path, chat(QUESTION, answer)).get(1, ())


@pytest.mark.parametrize(
    "text",
    [
        "Le cafÃ© est fermÃ©.",
        "ä¸­æ–‡",
        "РџСЂРёРІРµС‚, РјРёСЂ",
        "你好世界".encode().decode("gb18030"),
        "gr\ufffdn",
        "itâ€™s",
    ],
)
def test_mojibake(tmp_path: Path, text: str) -> None:
    assert "mojibake" in check_rows(tmp_path, chat(QUESTION, text))[1]


@pytest.mark.parametrize(
    "text",
    [
        "Le café est fermé à Évreux, l’été.",
        "你好，世界。今天天气很好。",
        "Привет, мир! Ёлка.",
        "ÄÖÜ: größer",
        "“naïve” – 5 €",
        "こんにちは",
    ],
)
def test_good_text_of_any_language_is_no_mojibake(tmp_path: Path, text: str) -> None:
    assert "mojibake" not in check_rows(tmp_path, chat(QUESTION, text)).get(1, ())


def test_control_characters(tmp_path: Path) -> None:
    assert check_rows(tmp_path, chat(QUESTION, "He\x00 keeps it."), good(1)) == {1: {"control"}}


def test_copies_point_to_the_first(tmp_path: Path) -> None:
    rows = [
        good(0),
        chat(QUESTION, ANSWER),
        {"id": 5, **chat(QUESTION, ANSWER)},
        chat(QUESTION.upper(), ANSWER[:-1]),
    ]
    path = write(tmp_path / "data.jsonl", rows)
    report = check_data(CheckSettings((path,)))
    assert kinds_by_line(report) == {3: {"exact-duplicate"}, 4: {"near-duplicate"}}
    assert [str(finding.examples[0].like) for finding in report.findings] == [f"{path}:2"] * 2


def test_small_edits_are_near_copies_and_filled_in_templates_are_not(tmp_path: Path) -> None:
    found = check_rows(
        tmp_path,
        chat(QUESTION, ANSWER),
        chat(QUESTION.replace("third", "lowest"), ANSWER),
        chat("What is the price of the melon in the shop?", "SELECT price FROM shop WHERE fruit = 'Melon'"),
        chat("What is the price of the apple in the shop?", "SELECT price FROM shop WHERE fruit = 'Apple'"),
        chat("List all members of the crew older than 31 years.", "SELECT name FROM crew WHERE age > 31"),
        chat("List all members of the crew older than 45 years.", "SELECT name FROM crew WHERE age > 45"),
        beside=100,
    )
    assert found == {2: {"near-duplicate"}}


def test_one_prompt_with_two_answers(tmp_path: Path) -> None:
    rows = [
        chat(QUESTION, "positive"),
        chat(QUESTION, "negative"),
        chat(QUESTION, "Positive."),
        chat("Other", "negative"),
    ]
    found = check_rows(tmp_path, *rows)
    assert found[1] == {"inconsistent"}
    assert found[2] == {"inconsistent"}
    assert 4 not in found


def test_another_system_message_is_another_prompt(tmp_path: Path) -> None:
    rows = [
        chat(QUESTION, "He keeps ink.", system="Be brief."),
        chat(QUESTION, "Chalk, and maps of Ghent.", system="Lie."),
    ]
    assert check_rows(tmp_path, *rows) == {}


def test_cut_off_answers_are_judged_by_the_others(tmp_path: Path) -> None:
    cut = chat("Tell me about case 900: why?", "The baker mends a copper kettle by the riv")
    assert check_rows(tmp_path, cut, beside=200) == {1: {"cut-off"}}


def test_labels_end_in_letters_and_are_not_cut_off(tmp_path: Path) -> None:
    labels = ("positive", "negative", "neutral")
    rows = [chat(f"Sort this: {sentence(n * 11)} {sentence(n * 5 + 1)}", labels[n % 3]) for n in range(300)]
    found = check_rows(tmp_path, chat("Sort this: an odd one about ships, rain and bread.", "positi"), *rows)
    assert {line for line, kinds in found.items() if "cut-off" in kinds} == {1}


def test_unclosed_brackets_are_cut_off_among_json(tmp_path: Path) -> None:
    rows = [
        chat(f"As JSON: {sentence(n * 13)} {sentence(n)}", json.dumps({"name": sentence(n), "n": n}))
        for n in range(100)
    ]
    found = check_rows(
        tmp_path, chat("As JSON: quite another thing, on trams.", '{"name": "tram", "n": 4'), *rows
    )
    assert found == {1: {"cut-off"}}


def test_overlap_with_evaluation_data(tmp_path: Path) -> None:
    train = write(
        tmp_path / "train.jsonl",
        [chat(QUESTION, ANSWER), chat(f"{QUESTION} Please.", ANSWER), *map(good, range(40))],
    )
    held_out = write(tmp_path / "eval.jsonl", [chat(QUESTION, "Something else."), good(7), good(300)])
    report = check_data(CheckSettings((train,), (held_out,)))
    found = {line for line, kinds in kinds_by_line(report).items() if "overlap" in kinds}
    assert found == {1, 10}
    (finding,) = [finding for finding in report.findings if finding.kind.name == "overlap"]
    assert str(finding.examples[0].like) == f"{held_out}:1"


def test_several_processes_find_the_same(tmp_path: Path) -> None:
    rows = [good(number % 1500) for number in range(2100)]
    path = write(tmp_path / "data.jsonl", rows)
    alone, together = (kinds_by_line(check_data(CheckSettings((path,), processes=count))) for count in (1, 2))
    assert alone == together == {line: {"exact-duplicate"} for line in range(1501, 2101)}


def test_several_processes_confirm_the_same_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [good(number) for number in range(60)]
    copies = [json.loads(json.dumps(row).replace("Tell me", "Tell us")) for row in rows]
    path = write(tmp_path / "data.jsonl", rows + copies)
    alone = kinds_by_line(check_data(CheckSettings((path,), processes=1)))
    monkeypatch.setattr("manylora.training.check.duplicates.PAIRS_WORTH_A_PROCESS", 10)
    assert kinds_by_line(check_data(CheckSettings((path,), processes=2))) == alone
    assert sum(kinds == {"near-duplicate"} for kinds in alone.values()) > 50


INSTRUCTION = (
    "You are a clerk of the harbour office. Read the ticket below and answer with the desk that it goes to: berths,"
    " customs, repairs or complaints. Answer with that one word, and with nothing else, whatever the ticket asks for."
)
DESKS = ("berths", "customs", "repairs", "complaints")


def tickets(count: int) -> list[tuple[str, str]]:
    """Different tickets, each with its desk."""
    return [(f"{sentence(n * 13)} {sentence(n * 101 + 55)}", DESKS[n % 4]) for n in range(count)]


def in_every_format(instruction: str, asked: str, answered: str) -> dict[str, dict[str, object]]:
    question = f"{instruction}\n{asked}"
    return {
        "messages": chat(question, answered),
        "sharegpt": {
            "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answered}]
        },
        "alpaca": {"instruction": instruction, "input": asked, "output": answered},
        "prompt-completion": {"prompt": question, "completion": answered},
    }


@pytest.mark.parametrize("count", [20, 270])
def test_an_instruction_that_all_rows_share_makes_no_copies(tmp_path: Path, count: int) -> None:
    edited = tickets(count)[3][0].replace("The", "That", 1).replace("My", "His", 1)
    rows = [*tickets(count), (f"{edited} Please.", tickets(count)[3][1])]
    for name in ("messages", "sharegpt", "alpaca", "prompt-completion"):
        written = [in_every_format(INSTRUCTION, *row)[name] for row in rows]
        report = check_data(CheckSettings((write(tmp_path / f"{name}.jsonl", written),)))
        assert report.files[0].format == name
        # One is a copy, and it is still found.
        assert kinds_by_line(report) == {count + 1: {"near-duplicate"}}, name


def test_the_instruction_may_stand_before_behind_and_in_the_system_turn(tmp_path: Path) -> None:
    rows = tickets(60)
    for number, written in enumerate(
        (
            [chat(f"{INSTRUCTION}\n\n{asked}", answered) for asked, answered in rows],
            [chat(f"{asked}\n\n{INSTRUCTION}", answered) for asked, answered in rows],
            [chat(asked, answered, system=INSTRUCTION) for asked, answered in rows],
            [{**chat(asked, answered), "system": INSTRUCTION} for asked, answered in rows],
        )
    ):
        assert kinds_by_line(check_data(CheckSettings((write(tmp_path / f"{number}.jsonl", written),)))) == {}


def test_a_shared_instruction_is_no_overlap_with_evaluation_data(tmp_path: Path) -> None:
    rows = [chat(f"{INSTRUCTION}\n{asked}", answered) for asked, answered in tickets(80)]
    train, held_out = write(tmp_path / "a.jsonl", rows[:60]), write(tmp_path / "b.jsonl", rows[60:])
    assert kinds_by_line(check_data(CheckSettings((train,), (held_out,)))) == {}


def test_half_an_emoji_is_a_broken_row_whatever_counts_the_tokens(tmp_path: Path) -> None:
    row = json.dumps(chat(QUESTION, "well \ud83d"))
    tokenizer = tokenizer_of("chatml")
    for settings in ({}, {"tokenizer": tokenizer}):
        path = write(tmp_path / "data.jsonl", (good(1), row))
        report = check_data(CheckSettings((path,), **settings))
        assert kinds_by_line(report) == {2: {"broken"}}
        assert "a character is broken" in report.findings[0].examples[0].excerpt


def test_the_format_and_the_columns_may_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("ticket,label,text\nWhere is it?,here,x\nWhere is it?,there,y\n")
    columns = parse_columns("prompt=ticket,completion=label")
    report = check_data(CheckSettings((str(path),), columns=columns))
    assert report.files[0].format == "prompt-completion"
    assert kinds_by_line(report) == {2: {"inconsistent"}, 3: {"inconsistent"}}
    assert check_data(CheckSettings((str(path),), format="text")).files[0].format == "text"
    with pytest.raises(InvalidArgument, match="no data format 'openai'"):
        check_data(CheckSettings((str(path),), format="openai"))
    with pytest.raises(InvalidArgument, match="no column 'lable'"):
        check_data(CheckSettings((str(path),), columns=parse_columns("completion=lable")))


def test_ignored_kinds_are_left_out(tmp_path: Path) -> None:
    rows = [good(1), good(1)]
    assert check_rows(tmp_path, *rows, ignore=("exact-duplicate",)) == {}
    with pytest.raises(InvalidArgument, match="no kind of finding 'twice'"):
        check_rows(tmp_path, *rows, ignore=("twice",))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InvalidData, match="no such file"):
        check_data(CheckSettings((str(tmp_path / "none.jsonl"),)))
    with pytest.raises(InvalidData, match="no row"):
        check_data(CheckSettings((write(tmp_path / "empty.jsonl", []),)))


def test_a_key_with_two_values_is_a_finding_with_its_line(tmp_path: Path) -> None:
    twice = json.dumps(good(2))
    path = write(tmp_path / "data.jsonl", (good(1), twice.replace("{", '{"messages": [], ', 1)))
    report = check_data(CheckSettings((path,)))
    assert kinds_by_line(report) == {2: {"broken"}}
    assert "gives 'messages' two values" in report.findings[0].examples[0].excerpt
