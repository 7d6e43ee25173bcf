"""Activated adapters by the engine on the decoder: in one batch, with prefixes shared, as peft and as added by hand."""

from pathlib import Path

import torch

from manylora.loadtest.checks.activated_exactness import check_activated


def test_activated_adapters_are_those_of_peft_in_company_and_with_the_base_s_keys_and_values(
    tmp_path: Path,
) -> None:
    found = list(check_activated(tmp_path, torch.device("cpu")))
    assert len(found) == 7
    assert all(outcome.passed for outcome in found), [each for each in found if not each.passed]
