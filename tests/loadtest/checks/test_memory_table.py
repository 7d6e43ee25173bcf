"""The tables that plans are held against."""

import json
from pathlib import Path

from manylora.loadtest.checks.memory_table import BASES, GRID, HELD_OUT, QUICK, write_data
from manylora.loadtest.checks.qwen_memory import LENGTHS, ROWS, SHAPES, predict, summary


def test_every_row_has_every_length_and_a_model() -> None:
    assert all(len(row.measured) == len(LENGTHS) and row.model in SHAPES for row in ROWS)
    assert sum(row.fitted for row in ROWS) == 5


def test_a_cell_is_planned_by_the_command(tmp_path: Path) -> None:
    row = ROWS[2]
    assert abs(predict(row, 1024, tmp_path) / row.measured[2] - 1) <= 0.15


def test_the_grid_has_both_methods_on_every_base() -> None:
    cells = {(cell.base, cell.method) for cell in GRID}
    assert cells >= {(base, method) for base in BASES for method in ("lora", "qlora")}
    assert {method for _, method in cells} == {"lora", "qlora", "dora", "qdora", "gptq"}
    assert {cell.checkpointing for cell in GRID if cell.base == HELD_OUT} == {True, False}
    assert 0 < len(QUICK) < len(GRID)


def test_rows_are_longer_than_they_will_be_cut(tmp_path: Path) -> None:
    rows = json.loads(write_data(tmp_path / "data.json", 64).read_text())
    # A token of the random bases is five letters and a space at most.
    assert all(len(row["conversations"][1]["value"]) > 6 * 64 for row in rows)


def test_errors_in_words() -> None:
    assert summary([0.1, -0.2]) == "worst 20.0%, mean 15.0% off (2 cells)"
