"""A run's peak memory on one device, part by part, from the sizes in config.json. No weights are opened.

Four moments of a run compete for the peak, and what is alive in all of them is counted once:

    the loss        what all layers saved, and the logits
    a layer         what all layers saved, and one layer's working set and unpacked matrix, going backward
    the step        the optimiser's temporaries
    an evaluation   no gradients and nothing saved; the logits of an evaluation batch, or the server that answers

The parts add up to the highest: ``logits`` is there in full, ``layer``, ``step`` and ``evaluation`` with what they need
beyond it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from manylora.training.memory import activations, dora
from manylora.training.memory.adapted import Adapted, adapted_layers, adapted_outputs, factor_values
from manylora.training.memory.native_caches import KERNEL_BYTES, MOST_KERNELS
from manylora.training.memory.quantised import bits_per_weight, scratch_bytes, stored_kind
from manylora.training.memory.qwen_recipe import plan_qwen, recipe_is_qwen
from manylora.training.memory.run_shape import DTYPES, RunShape, optimizer_bytes
from manylora.training.memory.served import answering_bytes, served_bytes
from manylora.training.memory.shape import ModelShape

GIB = 1 << 30

LOGIT_BYTES = 12
"""Bytes of a logit at the worst moment: float32 log-probabilities, their gradient, and that of the logits."""
EVAL_LOGIT_BYTES = 8
"""Of one that is only evaluated: in float32, and its log-probability."""
CUDA_CONTEXT = 0.9 * GIB
"""CUDA's context, cuBLAS workspaces and what the allocator rounds up: 0.5 to 1.4 GB."""
CPU_LIBRARIES = 0.55 * GIB
"""Resident size of Python with torch, transformers, peft and datasets, before a base is loaded."""
MMAP_BYTES = 32 << 20
"""glibc gives freed blocks of this size and above back to the system. Smaller ones stay on its heap (mallopt(3),
M_MMAP_THRESHOLD), where holes between those in use go unused:"""
KEPT_HOLES, LAYER_HOLES = 0.4, 1.2
"""their bytes for each byte of what layers keep and of one layer's working set. Measured on the first bases of
loadtest/checks/memory_table.py."""
PART_NAMES = {
    "weights": "the layers' matrices, as the base is stored",
    "embeddings": "embedding, head and norms, which aren't quantised",
    "adapters": "trained values: float32, and a copy in the run's dtype",
    "gradients": "theirs",
    "optimizer": "its state for them",
    "activations": "what all layers keep for the backward pass",
    "logits": "trained tokens × vocabulary, with their gradients",
    "layer": "one layer's backward pass, beyond the logits",
    "step": "the optimiser's temporaries, beyond both",
    "evaluation": "an evaluation's longest batch, beyond a step",
    "rollback": "the last good state, to go back to",
    "served": "the base as it is served, which answers for --eval_answers",
    "context": "CUDA's context, or Python's libraries",
    "kernels": "those that oneDNN compiles for each shape and keeps",
    "allocator": "what the C library's heap doesn't give back",
}
"""Every part and what it is, in words."""
OUTSIDE = ("context", "kernels", "allocator")
"""Parts that are no tensors."""
IN_A_STEP = ("gradients", "activations", "logits", "layer", "step")
"""Parts that are there during a step alone, and not while a run is evaluated."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Parts in GiB. Their sum is the peak."""

    parts: Mapping[str, float]

    @property
    def total_gib(self) -> float:
        """The peak: on CUDA what nvidia-smi shows for the process, on a CPU its resident size."""
        return sum(self.parts.values())

    @property
    def tensors_gib(self) -> float:
        """The peak of live tensors alone: what torch.cuda.max_memory_allocated counts."""
        return sum(size for name, size in self.parts.items() if name not in OUTSIDE)


def plan(model: ModelShape, run: RunShape, recipe: str | None = None) -> MemoryPlan:
    """Return the peak of a run of `manylora train`, or of Qwen's finetune.py with ``recipe`` "qwen".

    Raises InvalidArgument for targets that the model doesn't have, or another recipe.
    """
    sizes = plan_qwen(model, run) if recipe_is_qwen(recipe) else plan_ours(model, run)
    return MemoryPlan({name: size / GIB for name, size in sizes.items() if size > 0})


def plan_ours(model: ModelShape, run: RunShape) -> dict[str, float]:
    """Return the bytes of each part of our own run."""
    logits = LOGIT_BYTES * run.trained_share * run.tokens * model.vocab_size
    kept = saved_bytes(model, run)
    layer = layer_bytes(model, run)
    adapter = adapter_bytes(model, run)
    # For-each Adam on CUDA makes one list of float32 temporaries as long as all that is trained: as the gradients.
    step = adapter["gradients"] if run.device == "cuda" else 0.0
    parts = {
        **weight_bytes(model, run),
        **adapter,
        "activations": kept,
        "logits": logits,
        "layer": max(0.0, layer - logits),
        "step": max(0.0, step - kept - max(logits, layer)),
    }
    in_a_step = sum(parts[name] for name in IN_A_STEP)
    evaluation = max(evaluation_bytes(model, run), answering_bytes(model, run))
    parts["evaluation"] = max(0.0, evaluation - in_a_step)
    parts["served"] = served_bytes(model, run)
    if run.device == "cpu":
        # The last good state, which the loop goes back to when a loss runs away, is always on the host.
        parts["rollback"] = parts["optimizer"] + parts["gradients"]
    return {**parts, **_outside(model, run, kept, layer)}


def adapter_bytes(model: ModelShape, run: RunShape) -> dict[str, float]:
    """Return the bytes of what is trained, its gradients and the optimiser's state."""
    value = DTYPES[run.dtype]
    factors = factor_values(model, run)
    # Those of which autocast holds copies in the run's dtype. DoRA's lengths are in no product.
    embeddings = model.embedding_parameters if run.train_embeddings else 0
    multiplied = factors + (embeddings if run.whole is None else run.whole)
    trained = multiplied + (adapted_outputs(model, run) if run.use_dora else 0)
    start = factors if run.starts_from_base else 0
    return {
        "adapters": 4.0 * (trained + start) + (value if value < 4 else 0) * multiplied,
        "gradients": 4.0 * trained,
        "optimizer": optimizer_bytes(run.optim) * trained,
    }


def weight_bytes(model: ModelShape, run: RunShape) -> dict[str, float]:
    """Return the bytes of the base: its layers' matrices, and what isn't quantised (embedding, head, norms)."""
    kind = stored_kind(model, run.method)
    value = DTYPES[run.dtype]
    bits = 8 * value if kind is None else bits_per_weight(model, kind, double_quant=run.double_quant)
    return {
        "weights": model.layer_parameters * bits / 8,
        "embeddings": float(value * (model.embedding_parameters + model.small_parameters)),
    }


def saved_bytes(model: ModelShape, run: RunShape) -> float:
    """Return the bytes that all layers keep for the backward pass: with checkpointing, each its input alone."""
    # The last norm saves its float32 input.
    last = 4.0 * model.hidden_size * run.tokens
    if run.gradient_checkpointing:
        # A trained embedding is float32, and so is the residual stream that comes from it.
        stream = 4.0 if run.train_embeddings else DTYPES[run.dtype]
        return last + run.tokens * model.num_layers * stream * model.hidden_size
    return last + sum(
        count * _saved_by(model, run, layer) for layer, count in adapted_layers(model, run).items()
    )


def layer_bytes(model: ModelShape, run: RunShape) -> float:
    """Return the bytes that one layer's backward pass needs at a time, recomputed tensors included: the most of all."""
    kind = stored_kind(model, run.method)
    scratch = 0.0 if kind is None else scratch_bytes(model, kind, DTYPES[run.dtype])
    working = run.tokens * activations.working(model, run) + scratch + _mask_bytes(run)

    def needed(layer: Sequence[Adapted]) -> float:
        recomputed = _saved_by(model, run, layer) if run.gradient_checkpointing else 0.0
        if not run.use_dora:
            return recomputed + working
        backward = working + dora.backward_bytes(model, run, layer)
        return recomputed + max(backward, dora.norm_bytes(model, run, layer))

    return max(map(needed, adapted_layers(model, run)))


def _saved_by(model: ModelShape, run: RunShape, layer: Sequence[Adapted]) -> float:
    """Return the bytes that a layer saves when it isn't checkpointed."""
    saved = run.tokens * activations.saved(model, run, layer)
    if run.use_dora:
        saved += dora.kept_weights(model, run, layer)
    if run.starts_from_base and DTYPES[run.dtype] < 4:
        # Autocast's copies of factors that aren't trained are made anew at each pass.
        saved += DTYPES[run.dtype] * sum(each.values for each in layer)
    return saved


def evaluation_bytes(model: ModelShape, run: RunShape) -> float:
    """Return the bytes that the longest evaluation batch needs beside what a run always holds."""
    if not run.eval_seq:
        return 0.0
    held_out = replace(run, seq=run.eval_seq, batch=run.eval_batch, packing=False)
    kind = stored_kind(model, run.method)
    scratch = 0.0 if kind is None else scratch_bytes(model, kind, DTYPES[run.dtype])
    layer = held_out.tokens * activations.forward(model, held_out) + scratch + _mask_bytes(held_out)
    if run.use_dora:
        layer += max(dora.forward_bytes(model, held_out, each) for each in adapted_layers(model, run))
    return max(layer, EVAL_LOGIT_BYTES * run.trained_share * held_out.tokens * model.vocab_size)


def _mask_bytes(run: RunShape) -> float:
    return 3.0 * run.batch * run.seq**2 if activations.has_mask(run) else 0.0


def _outside(model: ModelShape, run: RunShape, kept: float, layer: float) -> dict[str, float]:
    """Return the bytes that aren't tensors."""
    if run.device == "cuda":
        return {"context": CUDA_CONTEXT}
    widths = (model.hidden_size, model.intermediate_size)
    small = sum(width for width in widths if 4 * run.tokens * width < MMAP_BYTES) / sum(widths)
    holes = small * (KEPT_HOLES * kept + LAYER_HOLES * layer)
    if stored_kind(model, run.method) == "nf4" and model.quantization is None:
        # Loading left as much behind as the 16-bit matrices that were quantised.
        matrices = (2.0 * inputs * outputs for _, inputs, outputs in model.matrices())
        holes += model.num_layers * sum(size for size in matrices if size < MMAP_BYTES)
    # float32's products are MKL's, which keeps nothing.
    kernels = MOST_KERNELS * KERNEL_BYTES if DTYPES[run.dtype] == 2 else 0
    return {"context": CPU_LIBRARIES, "kernels": float(kernels), "allocator": holes}
