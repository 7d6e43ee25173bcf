"""The fields of a config.json that would change the computation and that nothing here reads: they are refused.

transformers keeps fields that a family doesn't know and ignores them. Most are remarks. Those below are what
relatives of the served families compute with: a checkpoint that carries one means something else by its weights.
"""

from collections.abc import Mapping

from manylora.server.model.errors import UnsupportedModel

HfConfig = Mapping[str, object]

HARMLESS = frozenset(
    {
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "return_dict",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)
"""Fields of transformers' own config classes that change nothing in a forward pass that isn't training."""

# Field to the values with which it changes nothing; null never does.
REFUSED: Mapping[str, tuple[object, ...]] = {
    # experts
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "n_routed_experts": (0,),
    "num_experts_per_tok": (0, 1),
    "moe_intermediate_size": (0,),
    # other attention
    "alibi": (False,),
    "add_cross_attention": (False,),
    "attention_chunk_size": (0,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (0,),
    "clip_qkv": (),
    "dual_chunk_attention_config": ({},),
    "interleaved_sliding_window": ({},),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "kv_lora_rank": (0,),
    "no_rope_layer_interval": (0,),
    "no_rope_layers": ([],),
    "pruned_heads": ({},),
    "qk_layernorm": (False,),
    "query_pre_attn_scalar": (),
    "rope_interleaved": (False,),
    "sliding_window_pattern": (0, 1),
    "use_alibi": (False,),
    "use_bidirectional_attention": (False,),
    "use_dynamic_ntk": (False,),
    "use_logn_attn": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    # other scales and orders
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (0,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "residual_multiplier": (1,),
    "rotary_pct": (1,),
    "scale_depth": (),
    "scale_emb": (1,),
    "use_parallel_residual": (False,),
    # other inputs
    "audio_config": (),
    "text_config": (),
    "vision_config": (),
}


def check_fields(config: HfConfig) -> None:
    """Raise UnsupportedModel naming the first field that changes the computation and isn't read."""
    for field, neutral in REFUSED.items():
        value = config.get(field)
        if value is not None and value not in neutral:
            raise UnsupportedModel(
                f"config.json: {field} is {value!r}, which changes the computation and is not served"
            )
    kinds = config.get("architectures")
    if isinstance(kinds, list) and kinds and not any(str(kind).endswith("ForCausalLM") for kind in kinds):
        raise UnsupportedModel(f"config.json: architecture {kinds[0]!r} is not served, causal decoders are")
    code = config.get("auto_map")
    if isinstance(code, Mapping) and (own := [key for key in code if key.startswith("AutoModel")]):
        raise UnsupportedModel(
            f"config.json: auto_map names the checkpoint's own code for {own[0]}, which is never run"
        )
