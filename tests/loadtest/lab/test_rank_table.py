"""The table of ranks says mean and spread of each method's runs at each rate."""

from manylora.loadtest.lab.rank_table import METHODS, Outcome, report


def outcome(method: str, rate: float, seed: int, loss: float) -> Outcome:
    return Outcome(method, rate, seed, loss, 10.0 + seed, 20.0, 0.5, 81_920)


def test_runs_of_a_method_at_a_rate_become_one_line() -> None:
    runs = [("b", 0.01, 0, 0.1), ("a", 0.01, 0, 0.2), ("b", 0.01, 1, 0.3), ("b", 0.001, 0, 0.4)]
    lines = report([outcome(*run) for run in runs]).splitlines()
    assert [line.split()[:2] for line in lines[2:]] == [["a", "0.01"], ["b", "0.001"], ["b", "0.01"]]
    assert "0.2000 ± 0.1414" in lines[4]
    assert "10.5 ± 0.7" in lines[4]
    assert "81,920" in lines[4]
    assert "±" not in lines[2]


def test_every_method_scales_by_two() -> None:
    for method in METHODS:
        flags = dict(zip(method.flags[::2], method.flags[1::2], strict=True))
        schedule = flags.get("--rank_schedule", "").removeprefix("adalora:")
        first_rank = int(flags.get("--lora_r") or schedule.split(":")[0])
        assert float(flags["--lora_alpha"]) == 2 * first_rank
