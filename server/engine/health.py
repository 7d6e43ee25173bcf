"""Whether requests can still be answered: told by what fails in a row, and settled by a probe of the base.

One adapter whose weights overflow fails each of its requests, as do several of them; a client can send the same bad
prompt a hundred times. None of that is a reason to take traffic away from everybody else, so failing requests raise a
suspicion only: then the engine asks the base itself for a token, and again as long as it gets none. Only the probe's
failure, or steps that fail as a whole one after the other, say that the server isn't ready.
"""

from manylora.server.engine.request import GenerationRequest, SamplingParams

FAULTS_IN_A_ROW = 3
"""Failed steps without a good one between them after which the server is not ready; failed requests without a good one
between them after which the base is probed."""
PROBE_AGAIN = 1.0
"""Seconds from a probe that failed to the next."""
_PROBE_TOKENS = 4


class Health:
    """Counts faults. A request that fails because of its own fields or for want of room is none."""

    def __init__(self, vocab_size: int) -> None:
        ids = tuple(vocab_size * number // _PROBE_TOKENS for number in range(_PROBE_TOKENS))
        # Reporting the prompt's logprobs makes each of its tokens be computed, none be taken from the prefix cache.
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        # Ids of clients' requests end in random digits.
        self._probe = GenerationRequest("probe", ids, sampling)
        self._probing = False
        self._probe_at = 0.0
        self._probe_failed = False
        self.failed_steps = 0
        """Since one went well."""
        self.failed_requests = 0
        """Since one came to its end."""

    @property
    def trouble(self) -> str | None:
        """Why the server is not ready, if it isn't."""
        if self.failed_steps >= FAULTS_IN_A_ROW:
            return f"the last {self.failed_steps} steps failed"
        if self._probe_failed:
            return f"the last {self.failed_requests} requests failed, and so did one that the server made of the base"
        return None

    def step_ended(self, *, well: bool) -> None:
        """Note a step's end."""
        self.failed_steps = 0 if well else self.failed_steps + 1

    def is_probe(self, request: GenerationRequest) -> bool:
        """Say whether the engine made this request itself; it is nobody's, and counted nowhere."""
        return request is self._probe

    def request_failed(self, request: GenerationRequest, now: float) -> None:
        """Note that a request ended by a fault."""
        self.failed_requests += 1
        if self.is_probe(request):
            self._probing, self._probe_failed, self._probe_at = False, True, now + PROBE_AGAIN

    def request_finished(self, request: GenerationRequest) -> None:
        """Note that a request came to its end."""
        self.failed_requests, self._probe_failed = 0, False
        if self.is_probe(request):
            self._probing = False

    def next_probe(self) -> float | None:
        """Return from when on the base should be asked (time.monotonic()); None: there is no need."""
        suspicious = max(self.failed_requests, self.failed_steps) >= FAULTS_IN_A_ROW
        return self._probe_at if suspicious and not self._probing else None

    def take_probe(self, now: float) -> GenerationRequest | None:
        """Return the request to make of the base now, if one is due."""
        due = self.next_probe()
        if due is None or due > now:
            return None
        self._probing = True
        return self._probe
