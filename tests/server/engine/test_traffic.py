"""Any traffic through small pools: each request ends once, rightly unless it was itself aborted or in a failed step."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.server.engine.request import FinishReason, GenerationRequest
from tests.server.engine.fakes import Harness, Pools, ask, expected

WEIGHTS = (1.0, 0.5, 0.25, 2.0, -0.7)


@dataclass
class Traffic:
    """A harness, what was asked of it, and who may say that it went wrong."""

    harness: Harness
    asked: dict[str, GenerationRequest] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    in_failed_steps: set[str] = field(default_factory=set)

    def abort(self, name: str) -> None:
        """Abort a request; one that has ended doesn't mind."""
        if self.harness.engine.requests.get(name) is not None:
            self.aborted.add(name)
        self.harness.engine.abort(name)

    def fail_a_step(self) -> None:
        """Let the next step fail, if it computes anything."""
        engine = self.harness.engine
        running: set[str] = set()

        def fault(tokens: list[int]) -> Exception:
            running.update(sequence.owner.request.request_id for sequence in engine.scheduler.running)
            return RuntimeError("boom")

        before = self._failed()
        self.harness.model.fault = fault
        self.harness.step()
        self.harness.model.fault = lambda tokens: None
        failed = self._failed() - before
        assert failed <= running, "a request failed that had no part in the step"
        assert bool(failed) == bool(running), "a step failed and nobody was told"
        self.in_failed_steps |= failed

    def judge(self) -> None:
        """Hold each choice against the same request alone."""
        assert self._failed() == self.in_failed_steps, "a request failed without a fault of its own"
        for name, request in self.asked.items():
            invocations = {i: self.harness.engine.cache[i].invocation for i, _ in request.adapters}
            right = expected(
                request.prompt_token_ids, request.sampling.max_tokens, request.adapters, invocations
            )
            for index in range(request.n):
                reason, tokens = self.harness.reason(name, index), self.harness.tokens(name, index)
                assert tokens == right[: len(tokens)]
                if reason is FinishReason.LENGTH:
                    assert tokens == right
                else:
                    assert name in (self.aborted if reason is FinishReason.ABORTED else self.in_failed_steps)
        assert len(self.harness.observer.ended) == len(self.asked)

    def _failed(self) -> set[str]:
        return {o.request_id for o in self.harness.outputs if o.finish_reason is FinishReason.FAILED}


@st.composite
def small_pools(draw: st.DrawFn) -> Pools:
    """Pools so small that everything happens: chunks, preemption, sharing, eviction, loading."""
    return Pools(
        blocks=draw(st.integers(8, 20)),
        rows=draw(st.integers(12, 16)),
        host_bytes=draw(st.integers(0, 400)),
        max_running=draw(st.integers(1, 6)),
        max_step_tokens=draw(st.integers(2, 24)),
        max_overtakes=draw(st.integers(0, 4)),
        max_step_context=draw(st.integers(1, 60)),
    )


@st.composite
def requests(draw: st.DrawFn, name: str) -> GenerationRequest:
    """Short prompts of few letters, so that they share prefixes; base, adapters and mixtures; up to three clients."""
    ids = draw(st.lists(st.integers(1, 5), max_size=3, unique=True))
    return ask(
        name,
        draw(st.lists(st.integers(0, 1), min_size=1, max_size=14)),
        draw(st.integers(1, 16)),
        [(each, draw(st.sampled_from(WEIGHTS))) for each in ids],
        draw(st.integers(1, 6)),
        origin=draw(st.sampled_from(["", "", "x", "y"])),
    )


@given(st.data())
@settings(deadline=None, max_examples=80)
def test_any_traffic_ends_once_with_the_right_tokens(data: st.DataObject) -> None:
    traffic = Traffic(Harness(data.draw(small_pools())))
    harness = traffic.harness
    for adapter_id in range(1, 6):
        harness.know(
            adapter_id,
            data.draw(st.integers(1, 4)),
            cold=data.draw(st.booleans()),
            invocation=data.draw(st.sampled_from([(), (), (1,), (0, 1), (1, 1, 0)])),
        )
    for number in range(data.draw(st.integers(1, 10))):
        request = data.draw(requests(f"r{number}"))
        traffic.asked[request.request_id] = request
        harness.engine.add_request(request)
        for _ in range(data.draw(st.integers(0, 4))):
            harness.step()
            if data.draw(st.booleans()):
                harness.finish_loads()
            harness.engine.blocks.check_integrity()
            harness.engine.cache.check_integrity()
        match data.draw(st.sampled_from(["go on"] * 5 + ["abort"] * 2 + ["fault"])):
            case "abort":
                traffic.abort(data.draw(st.sampled_from(sorted(traffic.asked))))
            case "fault":
                traffic.fail_a_step()
    harness.run()
    traffic.judge()


@given(st.data())
@settings(deadline=None, max_examples=60)
def test_prefixes_chunks_and_aborts_at_any_moment_leave_every_answer_right(data: st.DataObject) -> None:
    """One prompt and its beginnings, again and again, in chunks that end anywhere in a block."""
    pools = Pools(
        blocks=data.draw(st.integers(16, 30)), max_step_tokens=data.draw(st.integers(1, 9)), max_running=4
    )
    traffic = Traffic(Harness(pools))
    harness = traffic.harness
    harness.know(1)
    prompt = data.draw(st.lists(st.integers(0, 63), min_size=20, max_size=30))
    for adapter_id in (2, 3):
        harness.know(adapter_id, invocation=prompt[data.draw(st.integers(0, 19)) :][:2])
    for number in range(data.draw(st.integers(2, 12))):
        cut = data.draw(st.integers(1, len(prompt)))
        adapters = data.draw(
            st.sampled_from([(), ((1, 1.0),), ((1, 0.5),), ((2, 1.0),), ((3, 1.0),), ((1, 1.0), (3, 0.5))])
        )
        request = ask(f"r{number}", prompt[:cut], data.draw(st.integers(1, 4)), adapters)
        traffic.asked[request.request_id] = request
        harness.engine.add_request(request)
        for _ in range(data.draw(st.integers(0, 6))):
            harness.step()
        if data.draw(st.booleans()):
            traffic.abort(f"r{data.draw(st.integers(0, number))}")
            harness.engine.blocks.check_integrity()
    harness.run()
    traffic.judge()
