"""The loss: against transformers' own, and the same however a batch is split."""

from pathlib import Path

import pytest
import torch

from manylora.training.loop.loss import token_losses, trained_token_loss
from manylora.training.loop.split import pieces
from tests.training.loop.making import collated, items, make_trainer, tiny_base, weights


def test_it_is_transformers_loss_at_the_trained_positions_alone(tmp_path: Path) -> None:
    model = tiny_base(tmp_path).model
    batch = collated(items(5))
    total, count = trained_token_loss(model, batch)
    expected = model(**batch).loss
    assert count == int((batch["labels"][:, 1:] != -100).sum())
    torch.testing.assert_close(total / count, expected, rtol=1e-6, atol=1e-6)


def test_a_batch_without_a_trained_token_has_no_loss(tmp_path: Path) -> None:
    model = tiny_base(tmp_path).model
    batch = collated(items(2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    total, count = trained_token_loss(model, batch)
    assert (float(total), count) == (0.0, 0)


def test_losses_know_their_rows(tmp_path: Path) -> None:
    model = tiny_base(tmp_path).model
    data = items(3)
    losses, rows = token_losses(model, collated(data))
    for row, item in enumerate(data):
        alone, _ = trained_token_loss(model, collated([item]))
        torch.testing.assert_close(losses[rows == row].sum(), alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 3])
def test_pieces_add_up_to_the_whole(tmp_path: Path, rows: int) -> None:
    model = tiny_base(tmp_path).model
    batch = collated(items(5))
    whole, _ = trained_token_loss(model, batch)
    parts = torch.stack([trained_token_loss(model, piece)[0] for piece in pieces(batch, rows)]).sum()
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def step_of(
    tmp_path: Path, name: str, batch: int, accumulation: int, packed: bool = False
) -> tuple[float, dict[str, torch.Tensor]]:
    """Run one optimiser step over the same eight examples and return its loss and what came out."""
    data = items(8)
    if packed:
        rows = [data[0:3], data[3:5], data[5:8]]
        data = [
            {
                "input_ids": [token for item in row for token in item["input_ids"]],
                "labels": [token for item in row for token in [-100, *item["labels"][1:]]],
                "position_ids": [place for item in row for place in range(len(item["input_ids"]))],
            }
            for row in rows
        ]
    trainer = make_trainer(
        tiny_base(tmp_path),
        tmp_path / name,
        data,
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
    )
    trainer.train()
    return float(trainer.state.log_history[0]["loss"]), weights(trainer)


def test_a_step_is_the_same_in_one_piece_in_eight_and_packed(tmp_path: Path) -> None:
    loss, trained = step_of(tmp_path, "one", 8, 1)
    for name, batch, accumulation, packed in (
        ("eight", 1, 8, False),
        ("four", 2, 4, False),
        ("packed", 3, 1, True),
    ):
        other, also = step_of(tmp_path, name, batch, accumulation, packed)
        assert other == pytest.approx(loss, abs=1e-5)
        for key, value in trained.items():
            torch.testing.assert_close(also[key], value, rtol=1e-3, atol=2e-5)


def test_evaluation_is_the_mean_over_trained_tokens_whatever_the_batches(tmp_path: Path) -> None:
    base = tiny_base(tmp_path)
    held_out = items(7, seed=1)
    trainer = make_trainer(base, tmp_path / "run", items(4), eval_data=held_out, per_device_eval_batch_size=3)
    metrics = trainer.evaluate()
    total, count = trained_token_loss(base.model, collated(held_out))
    assert metrics["eval_loss"] == pytest.approx(total.item() / count, abs=1e-5)
    assert metrics["eval_tokens"] == count
