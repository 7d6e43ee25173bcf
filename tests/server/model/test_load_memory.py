"""Quantising a 16-bit checkpoint takes the 4-bit model and about one fused matrix, never the 16-bit model."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

MB = 1 << 20
LAYERS, HIDDEN, MLP, VOCAB = 24, 384, 1088, 512
# Scratch of one chunk, libraries' first use, and a tensor that is both mapped and copied.
SLACK = 10 * MB


def write_checkpoint(directory: Path, vocab: int = VOCAB) -> int:
    """Write a Llama in bfloat16, in shards of three layers, and return its bytes."""
    shapes = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
    index: dict[str, str] = {}
    total = 0

    def save(name: str, tensors: dict[str, torch.Tensor]) -> int:
        save_file(tensors, directory / name)
        index.update(dict.fromkeys(tensors, name))
        return sum(tensor.nbytes for tensor in tensors.values())

    for first in range(0, LAYERS, 3):
        tensors: dict[str, torch.Tensor] = {}
        for layer in range(first, first + 3):
            path = f"model.layers.{layer}"
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{path}.{norm}.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
            for module in ("q_proj", "k_proj", "v_proj", "o_proj"):
                tensors[f"{path}.self_attn.{module}.weight"] = torch.randn(HIDDEN, HIDDEN).bfloat16()
            for module, shape in shapes.items():
                tensors[f"{path}.mlp.{module}.weight"] = torch.randn(shape).bfloat16()
        total += save(f"model-{first}.safetensors", tensors)
    embedding = torch.randn(vocab, HIDDEN).bfloat16()
    last = torch.ones(HIDDEN, dtype=torch.bfloat16)
    total += save(
        "model-last.safetensors", {"model.embed_tokens.weight": embedding, "model.norm.weight": last}
    )
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    config = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 6,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return total


def figures_of(directory: Path) -> dict[str, int]:
    script = Path(__file__).with_name("load_memory.py")
    done = subprocess.run(
        [sys.executable, script, directory, "double"],
        cwd=script.parents[3],
        # The threshold makes malloc give back what is freed, so that resident memory is what is in use.
        env={"PYTHONPATH": ".", "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_peak_memory_is_the_4_bit_model_and_one_matrix(tmp_path: Path) -> None:
    torch.manual_seed(0)
    stored = write_checkpoint(tmp_path)
    figures = figures_of(tmp_path)
    fused = 2 * MLP * HIDDEN * 2
    print(f"\nstored {stored / MB:.1f} MB, {figures}")  # noqa: T201  # pytest -s shows it
    assert figures["layers"] == LAYERS
    assert stored > 80 * MB
    assert figures["model"] < 0.3 * stored
    assert figures["peak"] <= figures["model"] + fused + SLACK


def test_a_large_embedding_is_read_before_the_layers_take_memory(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocab = 1 << 15
    write_checkpoint(tmp_path, vocab)
    figures = figures_of(tmp_path)
    assert figures["model"] > vocab * HIDDEN * 2
    assert figures["peak"] <= figures["model"] + 2 * MLP * HIDDEN * 2 + SLACK
