"""The table of ranks says mean and spread of each method's runs, in the methods' order."""

from loadtest.rank_table import METHODS, Outcome, report


def outcome(method: str, seed: int, loss: float) -> Outcome:
    return Outcome(method, seed, loss, 10.0 + seed, 20.0, 0.5, 81_920)


def test_runs_of_a_method_become_one_line() -> None:
    lines = report([outcome("b", 0, 0.1), outcome("a", 0, 0.2), outcome("b", 1, 0.3)]).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["b", "a"]
    assert "0.2000 ± 0.1414" in lines[2]
    assert "10.5 ± 0.7" in lines[2]
    assert "81,920" in lines[2]
    assert "0.2000" in lines[3]
    assert "±" not in lines[3]


def test_every_method_scales_by_two() -> None:
    for method in METHODS:
        flags = dict(zip(method.flags[::2], method.flags[1::2], strict=True))
        schedule = flags.get("--rank_schedule", "").removeprefix("adalora:")
        first_rank = int(flags.get("--lora_r") or schedule.split(":")[0])
        assert float(flags["--lora_alpha"]) == 2 * first_rank
