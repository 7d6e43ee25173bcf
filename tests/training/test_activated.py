"""Training an adapter that acts from an invocation on: there it learns, as peft computes it, and nowhere else."""

import json
from pathlib import Path

import pytest
import torch

from manylora.adapters.spec import AdapterSpec
from manylora.demo.task_data import write_tasks
from manylora.loadtest.material.checkpoints import TINY, write_base
from manylora.training.data.activation import NOWHERE, place_of
from manylora.training.data.collate import Collator
from manylora.training.data.render import IGNORED
from manylora.training.errors import InvalidArgument
from manylora.training.job import total_steps
from manylora.training.loop.loss import token_losses
from manylora.training.loop.split import pieces
from manylora.training.parsing import parse_arguments
from manylora.training.preparation import Prepared, prepare

START = "<|im_start|>assistant"
"""What the template puts in front of an answer: an invocation that every row has."""
X = IGNORED


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("activated")
    write_tasks(directory, 12, 4)
    write_base(directory / "tiny", TINY)
    return directory


def prepared(place: Path, *words: str) -> Prepared:
    arguments = parse_arguments(
        [
            *("--model_name_or_path", str(place / "tiny"), "--data_path", str(place / "sql.json")),
            *("--output_dir", str(place / "out"), "--use_lora", "--lora_r", "4", "--lora_dropout", "0"),
            *("--data_check", "off", *words),
        ]
    )
    return prepare(arguments, lambda rows: total_steps(arguments.training, rows), lambda _: None)


@pytest.mark.parametrize(
    ("ids", "labels", "at"),
    [
        ([7, 1, 2, 3], [X, X, X, 3], 1),
        ([1, 2, 1, 2, 3], [X, X, X, X, 3], 2),
        ([1, 2, 3, 1, 2], [X, X, 3, 1, 2], 0),
        ([1, 2, 3, 9, 1, 2, 3], [X, X, 3, X, X, X, 3], 4),
        ([1, 2, 3, 9, 5, 3, 6], [X, X, 3, X, X, 3, X], 0),
        ([5, 1, 3, 2], [X, X, 3, 2], NOWHERE),
        ([1, 2], [X, X], NOWHERE),
    ],
)
def test_it_acts_from_the_last_place_in_front_of_the_last_answer(
    ids: list[int], labels: list[int], at: int
) -> None:
    assert place_of((1, 2), ids, labels) == at


def test_what_is_predicted_before_that_is_not_trained() -> None:
    rows = [
        {"input_ids": [4, 5, 6, 1, 2, 7], "labels": [X, 5, X, X, X, 7]},
        {"input_ids": [4, 5, 6], "labels": [X, 5, 6]},
    ]
    batch = Collator(0, invocation=(1, 2))(rows)
    assert batch["activated_at"].tolist() == [[3], [NOWHERE]]
    assert batch["labels"].tolist() == [[X, X, X, X, X, 7], [X] * 6]
    assert "activated_at" not in Collator(0)(rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_and_its_gradient_are_those_of_peft_row_by_row(place: Path, checkpointing: bool) -> None:
    found = prepared(place, "--alora_invocation_string", START)
    model = found.model
    invocation = found.lora.invocation
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=torch.Generator().manual_seed(1))
    if checkpointing:
        model.activation_checkpointing_enable()
        model.enable_input_require_grads()
    rows = [found.train.dataset[number] for number in range(3)]
    batch = Collator(0, 64, invocation)(rows)
    model.train()
    with torch.no_grad():
        cuts = [token_losses(model, each)[0] for each in pieces(batch, 1)]  # type: ignore[arg-type]
    losses, owner = token_losses(model, batch)  # type: ignore[arg-type]
    torch.autograd.backward(losses.sum())
    total = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(torch.cat(cuts), losses, rtol=1e-4, atol=1e-4)
    model.zero_grad()
    model.activation_checkpointing_disable()
    for number, row in enumerate(rows):
        # The answers don't have it, so peft finds the same place by itself.
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids, use_cache=False).logits[0].float()
        at = place_of(invocation, row["input_ids"], row["labels"])
        trained = [i for i, label in enumerate(row["labels"]) if label != X and i > at]
        expected = torch.nn.functional.cross_entropy(
            logits[[i - 1 for i in trained]], ids[0, trained], reduction="none"
        )
        torch.testing.assert_close(losses[owner == number], expected, rtol=1e-4, atol=1e-4)
        torch.autograd.backward(expected.sum())
    assert total
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None
            torch.testing.assert_close(total[name], parameter.grad, rtol=1e-3, atol=1e-3)


def test_what_is_saved_says_so_to_the_server(place: Path, tmp_path: Path) -> None:
    found = prepared(place, "--alora_invocation_string", START)
    assert found.servable.yes
    found.policy.save(found.model, tmp_path, resumable=False)
    spec = AdapterSpec.parse(json.loads((tmp_path / "adapter_config.json").read_text()))
    assert spec.invocation == found.lora.invocation
    assert len(spec.invocation) > 1
    again = prepared(place, "--from_adapter", str(tmp_path))
    assert again.lora.invocation == spec.invocation


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--alora_invocation_string zz --alora_invocation_tokens 5", "give one of them"),
        ("--alora_invocation_tokens 320", "ids 0 to 319"),
        ("--alora_invocation_tokens -1", "ids 0 to 319"),
        ("--alora_invocation_tokens 1 1 1", "none of the first 12 rows"),
        ("--alora_invocation_string <|im_start|> --packing", "--packing"),
        ("--alora_invocation_string <|im_start|> --rank_schedule 4:0,8:0.5", "--rank_schedule"),
        ("--alora_invocation_string <|im_start|> --use_dora", "--use_dora"),
        ("--alora_invocation_string <|im_start|> --lora_bias all", "--lora_bias all"),
        ("--alora_invocation_string <|im_start|> --init_lora_weights pissa", "pissa"),
    ],
)
def test_what_does_not_go_with_it_is_refused(place: Path, words: str, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        prepared(place, *words.split())


def test_another_invocation_than_the_adapters_is_refused(place: Path, tmp_path: Path) -> None:
    found = prepared(place, "--alora_invocation_string", START)
    found.policy.save(found.model, tmp_path, resumable=False)
    with pytest.raises(InvalidArgument, match="differs from that of the adapter"):
        prepared(place, "--from_adapter", str(tmp_path), "--alora_invocation_tokens", "5")
