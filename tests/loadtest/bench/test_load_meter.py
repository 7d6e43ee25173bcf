"""When the load client itself is the limit."""

from manylora.loadtest.bench.load_meter import ClientLoad
from manylora.loadtest.material.summary import Spread


def test_a_client_says_when_it_is_the_limit() -> None:
    prompt, late = Spread.of([0.0001] * 10), Spread.of([0.03] * 10)
    assert ClientLoad(prompt, 0.3).verdict(0.02) is None
    assert "busy 95 %" in str(ClientLoad(prompt, 0.95).verdict(0.02))
    assert "30.0 ms late" in str(ClientLoad(late, 0.3).verdict(0.02))
    assert ClientLoad(late, 0.3).verdict(0.4) is None
