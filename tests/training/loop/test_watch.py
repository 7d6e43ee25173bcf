"""A watched run: whatever rows come, in whatever order, it is let alone; weights that get worse are noticed."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from manylora.training.errors import Diverged
from manylora.training.loop.events import Events
from manylora.training.loop.guard import Rows
from manylora.training.loop.verdict import Verdict
from manylora.training.loop.watch import GuardSettings, Watch
from manylora.training.rank.policy import Moment


class Run:
    """A run whose rows cost what they are hard, and what its one weight is off by."""

    def __init__(
        self, guard: str = "on", on_divergence: str = "backoff", *, keeps_copies: bool = True
    ) -> None:
        self.events = Events()
        self.trained = nn.Linear(1, 1, bias=False)
        self.optimizer = torch.optim.SGD(self.trained.parameters(), lr=1.0)
        self.rows: deque[float] = deque(maxlen=8)
        self.held_out: list[float] = []
        self.held_out_share = 1.0
        """Of what the weight is off by that held-out rows cost more."""
        self.first_says: Verdict | None = None
        """What the first of several processes makes of held-out rows."""
        self.step = 0
        asked = GuardSettings(guard, on_divergence)
        self.watch = Watch(self, asked, self.base_alone, keeps_copies=keeps_copies)
        self.off = 0.0

    @property
    def off(self) -> float:
        return float(self.trained.weight.detach())

    @off.setter
    def off(self, value: float) -> None:
        nn.init.constant_(self.trained.weight, value)

    @contextmanager
    def base_alone(self) -> Iterator[None]:
        """Have the weight be off by nothing, for a while."""
        off, self.off = self.off, 0.0
        yield
        self.off = off

    def moment(self) -> Moment:
        return Moment(self.step, 1000, self.optimizer, None)

    def recent_losses(self) -> list[float]:
        return [hard + self.off for hard in self.rows]

    def held_out_losses(self) -> list[float]:
        return [hard + self.held_out_share * self.off for hard in self.held_out]

    def agreed(self, verdict: Verdict) -> Verdict:
        return self.first_says or verdict

    def take(self, hard: list[float], norm: float = 1.0) -> None:
        """Take a step with these rows."""
        self.watch.begin_step(1000)
        self.rows.extend(hard)
        self.watch.look(Rows.of([each + self.off for each in hard]), norm)
        self.step += 1

    def go(self, steps: int, hard: list[float], off: Callable[[int], float]) -> None:
        """Take steps whose weight is off by ``off`` of the step."""
        for step in range(steps):
            self.off = off(step)
            self.take(hard)

    @property
    def kinds(self) -> list[str]:
        return [event.kind for event in self.events.all]


EASY, HARD = 0.1, 4.0
ORDERS = st.lists(st.sampled_from([EASY, HARD]), min_size=40, max_size=150)


@settings(max_examples=25, deadline=None)
@given(ORDERS, st.integers(1, 2), st.lists(st.sampled_from([0.1, 1.0, 200.0]), min_size=1, max_size=7))
def test_mixed_rows_in_any_order_are_no_divergence(
    order: list[float], batch: int, norms: list[float]
) -> None:
    run = Run()
    for at in range(0, len(order), batch):
        run.take(order[at : at + batch], norms[at % len(norms)])
    assert run.events.all == []


def test_rows_that_are_sorted_by_how_hard_they_are_are_no_divergence() -> None:
    run = Run()
    for hard in [EASY] * 60 + [HARD] * 60 + [EASY] * 10 + [2 * HARD] * 60:
        run.take([hard])
    assert run.events.all == []


@settings(max_examples=15, deadline=None)
@given(ORDERS, st.integers(1, 60))
def test_weights_that_fall_apart_are_noticed_in_any_order_of_the_rows(
    order: list[float], healthy: int
) -> None:
    run = Run()
    for step in range(healthy):
        run.take([order[step % len(order)]])
    run.off = 6.0
    for step in range(40):
        run.take([order[-1 - step]])
    assert run.kinds[:1] == ["backoff"]
    assert run.off == 0.0


def test_a_state_is_kept_to_come_back_to_only_after_the_steps_that_followed_it() -> None:
    for healthy in range(30, 60):
        run = Run()
        for step in range(healthy):
            run.take([(EASY, HARD)[step % 2]])
        run.off = 6.0
        for step in range(40):
            run.take([(EASY, HARD)[step % 2]])
        assert run.kinds == ["backoff"], healthy


def test_a_slow_decline_is_noticed_too() -> None:
    run = Run()
    run.go(400, [EASY, HARD], lambda step: run.off if run.kinds else 0.01 * step)
    assert run.kinds == ["backoff"]
    assert run.off < 1.0


def test_a_run_whose_held_out_loss_falls_is_never_stopped() -> None:
    run = Run()
    run.held_out, run.held_out_share = [2.0] * 32, -0.1
    run.go(100, [EASY], lambda step: 0.0 if step < 50 else 6.0)
    assert run.events.all == []
    worse = Run()
    worse.held_out = [2.0] * 32
    worse.go(100, [EASY], lambda step: worse.off if worse.kinds else 0.0 if step < 50 else 6.0)
    assert worse.kinds == ["backoff"]


def test_held_out_rows_have_their_veto_in_shards_too_where_the_base_alone_is_asked() -> None:
    run = Run(keeps_copies=False)
    run.held_out, run.held_out_share = [2.0] * 32, -0.1
    run.go(100, [EASY], lambda step: 0.0 if step < 50 else 6.0)
    assert run.events.all == []
    worse = Run(keeps_copies=False)
    worse.held_out = [2.0] * 32
    with pytest.raises(Diverged, match=r"cost 6\.1 nats a token where they cost 0\.1 with the base alone"):
        worse.go(100, [EASY], lambda step: 0.0 if step < 50 else 6.0)


def test_of_several_processes_the_first_one_has_the_veto() -> None:
    for first, kinds in ((Verdict(2.0, 1.0, rows=32), []), (Verdict(2.0, 9.0, rows=32), ["backoff"])):
        run = Run()
        run.held_out, run.held_out_share = [2.0] * 32, 1.0 if kinds == [] else -0.1
        run.first_says = first
        for step in range(60):
            run.off = 6.0 if step == 50 else run.off
            run.take([EASY])
        assert run.kinds == kinds


def test_a_norm_that_runs_away_is_trouble_only_where_the_rows_got_worse() -> None:
    run = Run()
    for step in range(60):
        run.take([HARD], 1000.0 if step > 40 else 1.0)
    assert run.events.all == []
    run.off = 6.0
    for _ in range(3):
        run.watch.guard.runaway = 2
        run.take([HARD], 1e6)
    assert run.kinds[:1] == ["backoff"]


def test_the_fourth_time_it_stops() -> None:
    run = Run()
    with pytest.raises(Diverged, match="after 3 steps back"):
        run.go(200, [EASY], lambda step: run.off + (step > 20))
    assert run.kinds == ["backoff"] * 3
    assert run.optimizer.param_groups[0]["lr"] == 0.125


def test_stop_stops_at_once_and_says_which_rows_cost_what() -> None:
    run = Run(on_divergence="stop")
    with pytest.raises(
        Diverged, match=r"cost 6\.1 nats a token where they cost 0\.1 with the weights of step \d"
    ):
        run.go(60, [EASY], lambda step: 6.0 if step > 20 else 0.0)


def test_warn_says_it_and_changes_nothing_and_off_does_not_look() -> None:
    for guard, kinds in (("warn", ["warning"]), ("off", [])):
        run = Run(guard=guard)
        run.go(60, [EASY], lambda step: 6.0 if step > 20 else 0.0)
        assert (run.kinds, run.off) == (kinds, 6.0)


def test_a_restored_watch_has_counted_the_steps_back() -> None:
    run = Run()
    run.watch.backoffs = 3
    again = Run()
    again.watch.restore(run.watch.state())
    with pytest.raises(Diverged, match="after 3 steps back"):
        again.take([float("nan")])


def resumed(run: Run) -> Run:
    """Go on from a checkpoint that is written now."""
    again = Run()
    again.watch.restore(run.watch.state())
    again.off, again.rows, again.step = run.off, run.rows, run.step
    return again


@pytest.mark.parametrize("healthy", [0, 3, 40])
def test_a_checkpoint_of_a_run_that_was_astray_is_no_good_state(healthy: int) -> None:
    run = Run()
    for _ in range(healthy):
        run.take([EASY, HARD])
    run.off = 6.0
    run.take([EASY, HARD])
    again = resumed(run)
    with pytest.raises(Diverged, match=r"where they cost 2\.05 with the base alone"):
        again.go(40, [EASY, HARD], lambda _: 6.0)


def test_no_checkpoint_keeps_weights_that_fell_apart_though_they_are_better_than_the_base() -> None:
    run = Run()
    run.go(40, [EASY, HARD], lambda _: -3.0)
    run.off = -1.0
    run.watch.before_saving()
    assert (run.kinds, run.off) == (["backoff"], -3.0)
    again = resumed(run)
    again.go(60, [EASY, HARD], lambda _: again.off)
    assert again.events.all == []


def test_a_checkpoint_of_weights_that_are_as_good_is_what_the_run_comes_back_to() -> None:
    run = Run()
    run.go(12, [EASY, HARD], lambda _: -1.0)
    run.off = -1.5
    run.watch.before_saving()
    run.go(20, [EASY, HARD], lambda _: run.off if run.kinds else 6.0)
    assert (run.kinds, run.off) == (["backoff"], -1.5)


@pytest.mark.parametrize(("guard", "held_out"), [("warn", 1.0), ("off", 1.0), ("on", -0.1)])
def test_a_checkpoint_changes_nothing_where_the_guard_would_not(guard: str, held_out: float) -> None:
    run = Run(guard=guard)
    run.held_out, run.held_out_share = [9.0] * 32, held_out
    run.go(40, [EASY, HARD], lambda _: -3.0)
    run.off = 6.0
    run.watch.before_saving()
    assert (run.kinds, run.off) == ([], 6.0)


def test_a_run_that_goes_on_from_a_good_checkpoint_is_let_alone_and_taken_back_as_ever() -> None:
    run = Run()
    run.go(12, [EASY, HARD], lambda _: -0.05)
    again = resumed(run)
    again.go(60, [EASY, HARD], lambda _: -0.05)
    assert again.events.all == []
    again.go(40, [EASY, HARD], lambda _: again.off if again.kinds else 6.0)
    assert again.kinds == ["backoff"]
    assert again.off == pytest.approx(-0.05)
