"""The base model before training: Qwen2 with weights that start close to copying.

From common random weights it takes long until a model's heads find out how to look something up. Two things shorten
that to some hundred steps (docs/demo.md has figures). In the first layer, head d starts by attending to the token d
places back (counted from one), by the biases that Qwen2 has on queries and keys. In the others, the output projection
starts as the transpose of the value projection, so that what a head attends to is copied ("mimetic" initialisation,
Trockman and Kolter 2023). All else is random, and all of it is trained.
"""

import torch
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer

from manylora.demo.tokenizer import CONTEXT

HIDDEN = 128
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
MLP = 384
LAYERS = 4
ROPE_THETA = 1000.0

EMBEDDING_STD = 0.5
FINAL_NORM = 0.2
"""Small, since the head is the embedding: logits of a copied token then start near 10 and not near 50."""
OUTPUT_SCALE = 0.5
POSITION_BIAS = 4.0
SLOWEST = 0.05
"""Pairs of dimensions that turn slower than this, in radians a token, don't tell neighbours apart."""


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen2ForCausalLM:
    """An untrained base model, float32."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(std=EMBEDDING_STD)
        model.model.norm.weight.fill_(FINAL_NORM)
        for layer in model.model.layers:
            _start_random(layer)
        for layer in model.model.layers[1:]:
            attention = layer.self_attn
            attention.o_proj.weight.copy_(OUTPUT_SCALE * attention.v_proj.weight.T)
        _start_looking_back(model.model.layers[0].self_attn)
    return model


def _start_random(layer: Qwen2DecoderLayer) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj):
        torch.nn.init.orthogonal_(linear.weight)
    attention.o_proj.weight.mul_(OUTPUT_SCALE)
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.normal_(std=HIDDEN**-0.5)
    mlp.down_proj.weight.zero_()


def _start_looking_back(attention: Qwen2Attention) -> None:
    """Head d attends to the token d places back: there the turned query and key biases point the same way."""
    attention.q_proj.weight.mul_(0.3)
    attention.k_proj.weight.mul_(0.3)
    speeds = ROPE_THETA ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    fast = POSITION_BIAS * (speeds > SLOWEST)
    key = torch.cat([fast, torch.zeros_like(fast)])
    queries = [
        torch.cat([fast * torch.cos(back * speeds), -fast * torch.sin(back * speeds)])
        for back in range(1, HEADS + 1)
    ]
    attention.k_proj.bias.copy_(key.repeat(HEADS))
    attention.q_proj.bias.copy_(torch.cat(queries))
