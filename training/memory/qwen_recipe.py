"""What Qwen's own finetune.py needs, as its README's table has it: on an A100, in GB of 10⁹ bytes.

That it counts in 10⁹ shows in its other table: Qwen-7B in 16 bits is 15.4 · 10⁹ B, and with the cache of 2,048 tokens
(1.1 · 10⁹ B) stands there as 16.99.

Four constants below are fitted to the table's rows for 1.8B and 7B (without 1.8B with embeddings); the others are
counted. Rows of 14B and 72B, and of 1.8B with embeddings, were kept out of the fit: docs/memory.md shows both.
"""

from manylora.training.errors import InvalidArgument
from manylora.training.memory.adapted import factor_values
from manylora.training.memory.quantised import bits_per_weight, stored_kind
from manylora.training.memory.run_shape import RunShape
from manylora.training.memory.shape import ModelShape

RECIPE = "qwen"

ADAPTER_STATE = 16
"""Bytes of a LoRA value: float32 weight, gradient and Adam's two moments."""
EMBEDDING_STATE = 8
"""Bytes of a trained embedding value: a second copy in 16 bits (modules_to_save), its gradient and two moments."""
STEP_TEMPORARIES = 3
"""Bytes of a trained value while Adam's for-each step runs. With the state, 11 bytes of an embedding value. Fitted."""
LORA_LOGIT = 14
"""Bytes of a logit in bf16 autocast: fitted; counted, 2 + 2 for the logits and their shifted copy, 4 + 4 for float32
ones and log-probabilities, and part of their gradients."""
QLORA_LOGIT = 7.3
"""Bytes of a logit with DeepSpeed's fp16, where nothing is cast up: fitted; counted, 2 each for logits, copy, log-
probabilities, and their gradient."""
CONTEXT = 1.5e9
"""CUDA's context and workspaces, and what the allocator holds unused. Fitted, such that the table is met whether its G
is 10⁹ or 2³⁰ bytes."""


def recipe_is_qwen(recipe: str | None) -> bool:
    """Return whether Qwen's script is planned for. Raises InvalidArgument for a recipe that isn't known."""
    if recipe not in (None, RECIPE):
        raise InvalidArgument(f"--recipe is {recipe!r}, expected {RECIPE}.")
    return recipe == RECIPE


def plan_qwen(model: ModelShape, run: RunShape) -> dict[str, float]:
    """Return the bytes of each part.

    Under Q-LoRA the layers are GPTQ Int4 and prepare_model_for_kbit_training makes embedding, head and norms float32.
    Gradient checkpointing and flash attention are on, as in the table: a layer keeps its input alone, and the logits
    outweigh a layer's working set at its vocabulary.
    """
    kind = stored_kind(model, run.method)
    not_quantised = model.embedding_parameters + model.small_parameters
    if kind is None:
        weights = 2.0 * model.layer_parameters
        embeddings = 2.0 * not_quantised
    else:
        weights = model.layer_parameters * bits_per_weight(model, "gptq" if kind == "nf4" else kind) / 8
        embeddings = 4.0 * not_quantised
    adapted = factor_values(model, run)
    # The script trains embedding and head of base models only, and never with --q_lora.
    whole = model.embedding_parameters if run.train_embeddings and kind is None else 0
    checkpoints = 2.0 * model.num_layers * run.tokens * model.hidden_size
    logits = (LORA_LOGIT if kind is None else QLORA_LOGIT) * run.tokens * model.vocab_size
    step = STEP_TEMPORARIES * (adapted + whole)
    return {
        "weights": weights,
        "embeddings": embeddings,
        "adapters": 4.0 * adapted + 2.0 * whole,
        "gradients": 4.0 * adapted + 2.0 * whole,
        "optimizer": (ADAPTER_STATE - 8.0) * adapted + (EMBEDDING_STATE - 4.0) * whole,
        "activations": checkpoints,
        "logits": logits,
        "step": max(0.0, step - checkpoints - logits),
        "context": CONTEXT,
    }
