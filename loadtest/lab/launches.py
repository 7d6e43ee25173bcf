"""Counts what a step of plain torch asks of a device: ops, by part of a layer, and where it waits for the device.

Run it with ``python -m manylora.loadtest.lab.launches``. On a CPU it counts the ops that are no views, each of which is
about one launch on a GPU (a few are several). On CUDA it also tells the time of each part, and by torch's profiler how
many kernels a step is, how long the GPU is busy with them, and how long a step takes recorded and op by op. Needs torch
and transformers, nothing else.
"""

import argparse
import gc
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from manylora.loadtest.lab.decoder_step import OPS, Clock, median_ms, run_step
from manylora.loadtest.material.checkpoints import SHAPES
from manylora.loadtest.material.decode_steps import decode_step, place_adapters
from manylora.loadtest.material.engines import served
from manylora.loadtest.material.environment import headline
from manylora.loadtest.material.random_model import DTYPES, QUANTIZATIONS, named_config, random_weights
from manylora.loadtest.material.text_table import text_table
from manylora.server.kernels.plain import PlainBackend
from manylora.server.kernels.plain.cuda_graph import CudaRecorder
from manylora.server.kernels.step import StepBatch
from manylora.server.model.decoder import Decoder
from manylora.server.model.served import ServedModel

ROOT = str(Path(__file__).resolve().parents[2])
CHUNK, STEP_TOKENS = 64, 512
"""Tokens of a prompt's chunk, and of all chunks of a step."""
WAITS = ("aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal", "aten.unique")
HOST_CALLS = ("tolist", "cpu", "numpy", "item")
"""Of tensors: each reads the device."""
NO_LAUNCH = (
    "aten.empty",
    "aten.new_empty",
    "aten.detach",
    "aten.lift_fresh",
    "aten._unsafe_view",
    "aten.alias",
)


class Tally(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Ops by part, and the lines that wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ops = Counter[str]()
        self.waits = Counter[str]()
        self.part = "other"

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, and do."""
        name = str(func)
        if name.startswith(WAITS):
            self.waits[f"{name} at {_caller()}"] += 1
        returns = func._schema.returns
        is_view = bool(returns) and all(
            each.alias_info is not None and not each.alias_info.is_write for each in returns
        )
        if not is_view and not name.startswith(NO_LAUNCH):
            self.ops[self.part] += 1
        return func(*args, **kwargs or {})

    def of_part(self, name: str, op: Callable[..., object]) -> Callable[..., object]:
        """Count what ``op`` does as part ``name``, unless it is called by another part."""

        def call(*args: object) -> object:
            before, self.part = self.part, name
            try:
                return op(*args)
            finally:
                self.part = before

        return call

    @contextmanager
    def host_calls(self) -> Iterator[None]:
        """Note which lines bring a tensor's values to the host."""
        originals = {name: getattr(Tensor, name) for name in HOST_CALLS}

        def noted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(tensor: Tensor, *args: Any, **rest: Any) -> Any:
                self.waits[f".{name}() at {_caller()}"] += 1
                return original(tensor, *args, **rest)

            return call

        for name, original in originals.items():
            setattr(Tensor, name, noted(name, original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(Tensor, name, original)


def _caller() -> str:
    """Return the innermost line of the project's own that is being run, but this file's."""
    for frame in reversed(traceback.extract_stack()):
        if frame.filename.startswith(ROOT) and frame.filename != __file__ and ".venv" not in frame.filename:
            return f"{frame.filename.removeprefix(ROOT + '/')}:{frame.lineno}"
    return "?"


def build(options: argparse.Namespace, quantization: str, *, recorded: bool) -> ServedModel:
    """Return a model of noise on plain torch, with room for the step."""
    device = torch.device(options.device)
    record = CudaRecorder(device) if recorded and device.type == "cuda" else None
    backend = PlainBackend(device, DTYPES[options.dtype], record=record, fixed_decodes=not options.as_on_cpu)
    config = named_config(options.model)
    if options.layers:
        config = replace(config, num_layers=options.layers, windows=config.windows[: options.layers])
    torch.manual_seed(0)
    decoder = Decoder(config, random_weights(config, backend, nf4=quantization == "nf4"), backend)
    rows = max(options.rows, STEP_TOKENS // min(options.context, CHUNK))
    return served(decoder, rows, options.context + CHUNK, options.adapters * options.rank)


def count_step(model: ServedModel, batch: StepBatch) -> Tally:
    """Run a step once uncounted, then once under a tally."""
    run_step(model, batch)
    tally, backend = Tally(), model.decoder.backend
    kept = {name: getattr(backend, name) for name in OPS}
    for name, op in kept.items():
        setattr(backend, name, tally.of_part(name, op))
    try:
        with tally, tally.host_calls():
            model(batch)
    finally:
        for name in kept:
            delattr(backend, name)
    return tally


def gpu_kernels(model: ServedModel, batch: StepBatch, top: int) -> tuple[int, float, list[list[str]]]:
    """Return a step's kernels, the ms that the GPU is busy with them, and the kernels that take most."""
    from torch.profiler import ProfilerActivity, profile

    run_step(model, batch)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        run_step(model, batch)
    count, spent, names = 0, 0.0, Counter[str]()
    calls = Counter[str]()
    for event in profiled.key_averages():
        micros = float(event.self_device_time_total)
        if micros > 0:
            count += event.count
            spent += micros
            names[event.key] += micros  # type: ignore[assignment]
            calls[event.key] += event.count
    rows = [[name[:90], f"{calls[name]}", f"{micros / 1000:.3f}"] for name, micros in names.most_common(top)]
    return count, spent / 1000, rows


def steps(model: ServedModel, options: argparse.Namespace) -> dict[str, StepBatch]:
    """Return a step that decodes, and one that brings prompts' chunks of as many tokens in all as the server takes."""
    adapters = place_adapters(model, [options.rank] * options.adapters)
    chunk = min(options.context, CHUNK)
    return {
        "decode": decode_step(model, options.rows, options.context, adapters),
        "prefill": decode_step(model, STEP_TOKENS // chunk, chunk, adapters, chunk),
    }


def tell_counts(model: ServedModel, batches: dict[str, StepBatch], title: str) -> None:
    """Print ops by part of each step, and what it waits for."""
    layers = len(model.decoder.weights.layers)
    tallies = {name: count_step(model, batch) for name, batch in batches.items()}
    parts = [*OPS, "other"]
    rows = [
        [name, f"{sum(tally.ops.values()) / layers:.1f}", *(str(tally.ops[part]) for part in parts)]
        for name, tally in tallies.items()
    ]
    _say(f"{title}: ops that are no views, {layers} layers")
    _say(text_table(["step", "a layer", *parts], rows))
    for name, tally in tallies.items():
        for line, count in tally.waits.most_common():
            _say(f"{name} waits: {count} × {line}")


def tell_times(options: argparse.Namespace, quantization: str, title: str) -> None:
    """Print, of a GPU, what the steps take recorded and op by op, and what is in them."""
    rows = []
    for recorded in (False, True):
        model = build(options, quantization, recorded=recorded)
        for name, batch in steps(model, options).items():
            spent = median_ms(lambda m=model, b=batch: run_step(m, b), options.repeats)  # type: ignore[misc]
            if recorded and name == "prefill":
                continue
            count, busy, top = gpu_kernels(model, batch, options.top if recorded or name == "prefill" else 0)
            how = "recorded" if recorded else "op by op"
            rows.append([name, how, f"{spent:.2f}", str(count), f"{busy:.2f}"])
            for line in top:
                _say("  ".join([name, *line]))
        if not recorded:
            _tell_parts(model, steps(model, options), options.repeats)
        del model
        gc.collect()  # a backend and the steps that it keeps know each other
        torch.cuda.empty_cache()
    _say(text_table([title, "", "ms", "kernels", "GPU busy, ms"], rows))


def _tell_parts(model: ServedModel, batches: dict[str, StepBatch], repeats: int) -> None:
    """Print how long the host takes to issue each part."""
    clock, rows = Clock(), []
    clock.wrap(model.decoder.backend)
    for name, batch in batches.items():
        clock.seconds.clear()
        for _ in range(repeats):
            run_step(model, batch)
        rows.append([name, *(f"{1000 * clock.seconds[op] / repeats:.2f}" for op in OPS)])
    _say(text_table(["issuing, ms", *OPS], rows))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201  # the result


def main() -> None:
    """Count, and on a GPU measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="qwen2.5-0.5b", help=", ".join(SHAPES))
    parser.add_argument("--quantization", nargs="+", default=QUANTIZATIONS, choices=QUANTIZATIONS)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--context", type=int, default=100)
    parser.add_argument("--layers", type=int, default=0, help="0: the model's own")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--top", type=int, default=0, help="kernels to name")
    parser.add_argument("--as-on-cpu", action="store_true", help="decode steps in no fixed shapes")
    options = parser.parse_args()
    _say(headline())
    for quantization in options.quantization:
        title = f"{options.model}, {options.dtype}, {quantization}, {options.rows} rows"
        if options.device == "cpu":
            model = build(options, quantization, recorded=False)
            tell_counts(model, steps(model, options), title)
        else:
            tell_times(options, quantization, title)


if __name__ == "__main__":
    main()
