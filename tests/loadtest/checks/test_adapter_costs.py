"""What counts as the cost of mixed ranks and as growth; and that both tables come out."""

import pytest

from manylora.loadtest.checks import adapter_costs
from manylora.loadtest.checks.adapter_costs import Costs, quartile


def costs(mixed: float, *distinct: float) -> Costs:
    """Steps of 10 ms whose adapters add 1, 2, 4 and 8 ms: 3.75 on average."""
    added = {"base alone": 0.0, "rank 8": 1.0, "rank 16": 2.0, "rank 32": 4.0, "rank 64": 8.0, "mixed": mixed}
    steps = {name: (10 + ms) / 1000 for name, ms in added.items()}
    return Costs(steps, {2**place: seconds for place, seconds in enumerate(distinct)})


def test_mixed_ranks_are_held_to_the_mean_of_what_each_adds() -> None:
    assert costs(3.75).ratio == pytest.approx(1)
    assert costs(4.1).keeps_to_the_sum
    assert not costs(4.2).keeps_to_the_sum
    assert not costs(3.3).keeps_to_the_sum
    assert not costs(8.0).keeps_to_the_sum, "the largest rank for all"


def test_a_step_that_takes_twice_as_long_for_twice_as_many_is_no_growth() -> None:
    assert costs(3.75, 0.010, 0.012, 0.020).grows
    assert not costs(3.75, 0.010, 0.020, 0.030).grows
    assert not costs(3.75, 0.010, 0.012, 0.025).grows


def test_what_counts_is_the_lower_quartile() -> None:
    assert quartile([9.0, 1.0, 8.0, 2.0, 7.0, 3.0, 6.0, 4.0]) == 3.0


@pytest.mark.parametrize("kernels", ["auto", "plain"])
def test_both_tables_come_out(
    kernels: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["adapter_costs", "--model", "tiny", "--kernels", kernels, "--most", "4", "--rounds", "2"]
    monkeypatch.setattr("sys.argv", [*words, "--context", "20", "--each", "1"])
    with pytest.raises(SystemExit) as ended:
        adapter_costs.main()
    lines = capsys.readouterr().out.splitlines()
    for name in ("base alone", "rank 8", "rank 64", "mixed", "1", "2", "4"):
        assert any(line.startswith(name) for line in lines), name
    verdicts = [line[:4] for line in lines if line.startswith(("pass: ", "FAIL: "))]
    assert len(verdicts) == 2
    assert ended.value.code == int("FAIL" in verdicts)
