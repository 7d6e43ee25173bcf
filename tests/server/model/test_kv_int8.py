"""An engine whose keys and values are kept in 8 bits: what the prefix cache has, or is computed again, says the same.

A chunk of a prompt reads its own keys as they were written, rounded, like those that lay there before: else where a
prompt was cut would be felt.
"""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from manylora.loadtest.material.engines import EngineSizes, build_engine
from manylora.server.engine.engine import Engine
from manylora.server.kernels.backend import AnyBackend
from manylora.server.kernels.choose import choose_backend
from manylora.server.model.decoder import Decoder
from manylora.server.model.loader import load_weights
from tests.server.engine.fakes import ask
from tests.server.model.models import save_model
from tests.server.model.steps import CPU

PROMPTS = [[(7 * number + 3 * place) % 320 for place in range(70)] for number in range(3)]
ANSWER = 40


@pytest.fixture(params=["plain", "auto"])
def decoder(request: pytest.FixtureRequest, tmp_path: Path) -> Decoder:
    """Of sliding windows, on plain torch and on the native kernels, if there are any."""
    save_model("qwen2-window", tmp_path)
    backend: AnyBackend = choose_backend(CPU, torch.float32, request.param, 2, kv_dtype=torch.int8)
    config, weights, _ = load_weights(tmp_path, backend, quantization="none")
    return Decoder(config, weights, backend)


def answers(engine: Engine, prompts: Sequence[list[int]]) -> list[list[int]]:
    """Return the greedy answers to prompts that come at once."""
    found: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    for name, prompt in zip(found, prompts, strict=True):
        engine.add_request(ask(name, prompt, ANSWER))
    while len(engine.requests):
        engine.step()
        for output in engine.requests.take_outputs():
            assert output.error is None
            found[output.request_id] += output.token_ids
    return list(found.values())


def test_what_was_computed_again_or_found_in_the_prefix_cache_says_the_same(decoder: Decoder) -> None:
    roomy = build_engine(decoder, EngineSizes(3, 512, 1))
    expected = [answers(roomy, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(each) for each in expected}) == len(PROMPTS)
    hits = roomy.blocks.hit_tokens
    assert answers(roomy, PROMPTS) == expected
    assert roomy.blocks.hit_tokens > hits
    # 12 blocks, where the three take 7 each.
    tight = build_engine(decoder, EngineSizes(3, 64, 1, max_step_tokens=24))
    assert answers(tight, PROMPTS) == expected
    assert tight.preemptions > 0
