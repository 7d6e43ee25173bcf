"""The demo's data: what is trained on and what is held out never meet, and answers are right."""

import json
import random
import sqlite3

import pytest

from manylora.demo.examples import chat, text_of
from manylora.demo.forms import ADAPTERS, FORMS
from manylora.demo.heldout import Prompt, held_out_prompts
from manylora.demo.pretrain import CURRICULUM
from manylora.demo.schedule import Schedule
from manylora.demo.tables import Question, Table, draw_question, draw_table
from manylora.demo.words import SCHEMAS

DRAWS = 300


@pytest.fixture(scope="module")
def prompts() -> tuple[Prompt, ...]:
    return held_out_prompts()


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    rng = random.Random(7)
    return [draw_question(rng, draw_table(rng)) for _ in range(DRAWS)]


def run_sql(table: Table, query: str) -> list[tuple[object, ...]]:
    """The rows that SQLite gives for a query on the table, its columns in the table's order."""
    columns = (table.schema.key, *table.columns)
    with sqlite3.connect(":memory:") as database:
        database.execute(f"CREATE TABLE {table.schema.table} ({', '.join(columns)})")
        database.executemany(
            f"INSERT INTO {table.schema.table} VALUES (?, ?, ?)",
            [[table.cell(row, column) for column in columns] for row in table.rows],
        )
        return database.execute(query).fetchall()


def test_the_query_finds_the_answer(questions: list[Question]) -> None:
    for question in questions:
        assert run_sql(question.table, FORMS["sql"](question)) == [(question.answer,)]


def test_the_object_holds_what_was_given_and_the_answer(questions: list[Question]) -> None:
    for question in questions:
        expected = {question.given: question.given_value, question.asked: question.answer}
        assert json.loads(FORMS["json"](question)) == expected


def test_both_voices_say_the_answer(questions: list[Question]) -> None:
    for question in questions:
        assert f"is {question.answer}." in FORMS["plain"](question)
        assert f"be {question.answer}, " in FORMS["pirate"](question)


def test_forms_never_agree(questions: list[Question]) -> None:
    for question in questions:
        assert len({form(question) for form in FORMS.values()}) == len(FORMS)


def test_training_and_held_out_tables_are_disjoint(prompts: tuple[Prompt, ...]) -> None:
    assert all(prompt.question.table.held_out for prompt in prompts)
    rng = random.Random(11)
    assert not any(draw_table(rng).held_out for _ in range(DRAWS))


def test_a_table_is_held_out_in_any_order(prompts: tuple[Prompt, ...]) -> None:
    table = prompts[0].question.table
    assert Table(table.schema, table.rows[::-1], table.columns[::-1]).held_out


def test_each_adapter_has_prompts_about_every_table(prompts: tuple[Prompt, ...]) -> None:
    for adapter in ADAPTERS:
        own = [prompt for prompt in prompts if prompt.adapter == adapter]
        assert len(own) >= 100
        assert {prompt.question.table.schema for prompt in own} == set(SCHEMAS)


def test_the_same_seed_draws_the_same_examples() -> None:
    def draw(seed: int) -> list[str]:
        rng = random.Random(seed)
        return [text_of(stage.draw(rng)) for stage in CURRICULUM for _ in range(20)] + [
            text_of(chat(rng, "json"))
        ]

    assert draw(3) == draw(3) != draw(4)


def test_the_rate_rises_stays_and_falls() -> None:
    schedule = Schedule(steps=100, warmup=10, fall=0.5)
    shares = [schedule.share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert max(shares) == shares[10] == shares[50] == 1.0
    assert shares[50:] == sorted(shares[50:], reverse=True)
    assert 0.05 < shares[99] < 0.1
