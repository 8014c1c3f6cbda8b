"""Tiny configurations of every text decoder that transformers builds, with nothing left at a value that hides a mistake.

`x` has the defaults of model type `x`, made small; `x+` has all its switches flipped, and other rotary factors;
`x+rope=longrope,scale_embedding=true` has those settings only.
"""

import json
import re
from typing import Any

VOCABULARY, WINDOW, CONTEXT = (
    1024,
    8,
    16,
)  # of the embedded tokenizer; texts are longer than the rest

# the first pattern that matches a field's name gives its value
SIZES: list[tuple[str, Any]] = [
    (r"(num_experts_per_tok|num_experts_per_token|moe_top_?k|moe_k|top_k_experts)", 2),
    (r"(unpadded_|output_)?vocab_size(_per_layer_input)?", VOCABULARY),
    (r"bos_token_id", 0),
    (r"eos_token_id", 1),
    (r"pad_token_id", 1),
    (r"(hidden_size|n_embd|d_model|embed_dim|emb_dim|word_embed_proj_dim|lru_width|attention_hidden_size|embedding_dim|embedding_size|input_embedding_size|output_embedding_size)", 32),
    (r"(intermediate_size|moe_intermediate_size|dense_intermediate_size|.*shared_experts?_intermediate_size|shared_intermediate_size|n_inner|ffn_dim|ffn_hidden_size|decoder_ffn_dim|encoder_ffn_dim|intermediate_size_mlp|expert_ffn_hidden_size|dim_ff|dff|d_inner|feed_forward_size)", 48),
    (r"(num_hidden_layers|n_layers?|num_layers|decoder_layers|encoder_layers|num_decoder_layers|num_encoder_layers)", 3),
    (r"(num_attention_heads|n_heads?|attention_heads|num_heads|decoder_attention_heads|encoder_attention_heads|num_decoder_attention_heads|num_encoder_attention_heads)", 4),
    (r"(num_key_value_heads|num_kv_heads|kv_n_heads|num_global_key_value_heads)", 2),
    (r"(head_dim|global_head_dim|kv_channels|attention_head_dim|d_head|dim_head|v_head_dim|qk_nope_head_dim|index_head_dim|swa_head_dim|linear_key_head_dim|linear_value_head_dim|linear_head_dim)", 8),
    (r"(qk_rope_head_dim|rotary_dim)", 4),
    (r"(q_lora_rank|kv_lora_rank|o_lora_rank|laurel_rank|hidden_size_per_layer_input|gated_norm_rank)", 16),
    (r"(num_experts|num_local_experts|n_routed_experts|moe_num_experts)", 4),
    (r"(n_group|num_expert_group|topk_group|o_groups)", 1),
    (r"(first_k_dense_replace|num_dense_layers)", 1),
    (r"index_n_heads", 2),
    (r"(index_topk|index_topk_blocks|attention_chunk_size|floor_scale|log_scaling_n_floor)", WINDOW),
    (r"(sliding_window|sliding_window_size|window_size|local_attention|attention_window_size)", WINDOW),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length)", 64),
    (r"original_max_position_embeddings", CONTEXT),
    (r"(state_size|mamba_d_state|ssm_state_size)", 4),
    (r"(time_step_rank|mamba_dt_rank)", 4),
    (r"(mamba_n_heads|mamba_num_heads|n_mamba_heads|linear_num_key_heads|linear_num_value_heads|linear_num_heads)", 4),
    (r"(mamba_d_head|mamba_head_dim|mamba_headdim)", 16),
    (r"(mamba_n_groups|mamba_ngroups|n_groups)", 2),
    (r"mamba_d_ssm", 64),
    (r"(mamba_chunk_size|chunk_size)", WINDOW),
    (r"query_pre_attn_scalar", 5),
    (r"(logits_scaling|routed_scaling_factor|moe_routed_scaling_factor|route_scale)", 1.5),
    (r"(embedding_multiplier|lm_head_multiplier|key_multiplier|attention_in_multiplier|attention_out_multiplier|ssm_in_multiplier|ssm_out_multiplier)", 1.3),
    (r"(residual_multiplier|logit_scale|attention_multiplier|attention_value_scale|softmax_scale|partial_rotary_factor)", 0.5),
    (r"(final_logit_softcapping|logits_soft_cap|attn_logit_softcapping|output_logit_soft_cap)", 5.0),
    (r"mlp_multipliers", [1.2, 0.8]),
    (r"ssm_multipliers", [1.1, 0.9, 1.2, 0.8, 1.3]),
    (r"(attn_pdrop|embd_pdrop|resid_pdrop|.*dropout.*prob|.*dropout|.*layerdrop)", 0.0),
]  # fmt: skip
FLIPPED = (
    r"(tie_word_embeddings|attention_bias|attention_out_bias|mlp_bias|bias|use_bias|qkv_bias|use_qkv_bias|add_bias_linear"
    r"|use_qk_norm|qk_layernorm|qk_ln|no_bias|use_parallel_residual|parallel_attn|new_decoder_architecture|alibi"
    r"|do_layer_norm_before|apply_residual_connection_post_layernorm|scale_attn_weights"
    r"|scale_attn_by_inverse_layer_idx|scale_embedding|norm_topk_prob|conv_bias|use_conv_bias|mamba_conv_bias|mamba_proj_bias"
    r"|mamba_norm_before_gate|mamba_rms_norm|attn_temperature_tuning|rope_interleave"
    r"|multi_query|norm_bias|lm_head_bias|mup_enabled|use_mem_rope|use_shared_attention_adapter|use_double_wide_mlp"
    r"|rescale_prenorm_residual|residual_in_fp32|use_sliding_window)"
)
LAYER_TYPES = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")
ROPES: list[dict[str, Any]] = [
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    {"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": CONTEXT},
    {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": CONTEXT,
     "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"rope_type": "linear", "factor": 4.0},
]  # fmt: skip
# what no rule gives: fields of a model type, and of its switched twin
OWN: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local", "global"], 1]]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral3": {
        "rope_parameters": {
            "original_max_position_embeddings": CONTEXT,
            "llama_4_scaling_beta": 0.3,
        }
    },
    "mpt": {"attn_config": {"attn_pdrop": 0, "softmax_scale": 0.3}},
    "zamba2": {
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
        "num_key_value_heads": 4,
        "kv_channels": 8,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "deepseek_v4": {"head_dim": 8},
}
SWITCHED: dict[str, dict[str, Any]] = {
    "falcon": {"parallel_attn": True, "alibi": False},
    "recurrent_gemma": {"rope_parameters": {"rope_type": "default"}},
}


# switches that a twin sets together with others, each on its own
VARIANTS = [
    *(f"llama+rope={rope['rope_type']}" for rope in ROPES),
    *(
        f"{kind}+rope=longrope"
        for kind in ("phi3", "gemma3_text", "deepseek_v3", "gpt_neox", "glm")
    ),
    "gpt2+scale_attn_weights=false",
    "gpt2+scale_attn_by_inverse_layer_idx=true",
    "gpt2+tie_word_embeddings=false",
    "falcon+new_decoder_architecture=true",
    "falcon+new_decoder_architecture=true,multi_query=false",
    "falcon+parallel_attn=false",
    "falcon+alibi=true",
    "falcon+multi_query=false,num_kv_heads=4",
    "falcon+bias=true",
    "bloom+tie_word_embeddings=false",
    "bloom+apply_residual_connection_post_layernorm=true",
    "gemma3_text+attn_logit_softcapping=null",
    "gemma3_text+attn_logit_softcapping=null,use_bidirectional_attention=true",
    "gpt_neox+use_parallel_residual=false",
    "opt+do_layer_norm_before=false",
    "opt+word_embed_proj_dim=16",
    "stablelm+use_parallel_residual=true",
    "stablelm+qk_layernorm=true",
    "phi+qk_layernorm=true",
    "mistral+sliding_window=null",
    "qwen2+use_sliding_window=true,max_window_layers=1",
    "qwen3+use_sliding_window=true,max_window_layers=1",
    "olmo+clip_qkv=0.5",
    "mpt+tie_word_embeddings=false",
    "cohere+use_qk_norm=true",
    "codegen+tie_word_embeddings=true",
    "xglm+scale_embedding=false",
    "nanochat+final_logit_softcapping=2.0",
    "gemma+use_bidirectional_attention=true",
]


def names() -> list[str]:
    """The model types that `AutoModelForCausalLM` builds, each with its twin, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kinds = [name for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES for name in (kind, f"{kind}+")]
    return kinds + VARIANTS


def configuration(name: str) -> Any:
    """The tiny configuration of that name."""
    from transformers import AutoConfig

    kind, plus, text = name.partition("+")
    settings = {k: v for k, _, v in (part.partition("=") for part in text.split(",") if part)}
    switched = bool(plus) and not text
    picked = ROPES[sum(map(ord, kind)) % len(ROPES)]["rope_type"] if switched else None
    fields = _fields(AutoConfig.for_model(kind).to_dict(), switched, settings.pop("rope", picked))
    own = OWN.get(kind, {}) | (SWITCHED.get(kind, {}) if switched else {})
    own |= {key: json.loads(value) for key, value in settings.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(fields.get(key), dict)
        fields[key] = fields[key] | value if both else value
    config = AutoConfig.for_model(kind, **fields)
    config.architectures = [class_name(kind)]
    return config


def class_name(kind: str) -> str:
    """What `AutoModelForCausalLM` builds of a model type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind])


def _fields(default: dict[str, Any], switched: bool, rope: str | None) -> dict[str, Any]:
    """The fields whose value is not the default one."""
    fields: dict[str, Any] = {}
    for name, value in default.items():
        rule = next((new for pattern, new in SIZES if re.fullmatch(pattern, name)), ...)
        if isinstance(value, dict) and "model_type" in value:
            fields[name] = _fields(value, switched, rope) | {"model_type": value["model_type"]}
        elif name == "rope_parameters" and value:
            fields[name] = _rope(value, default, rope)
        elif name in LAYER_TYPES and value:
            kinds = list(dict.fromkeys(value))
            fields[name] = [kinds[i % len(kinds)] for i in range(3)]
        elif switched and re.fullmatch(FLIPPED, name) and isinstance(value, bool):
            fields[name] = not value
        elif rule is not ...:
            fields[name] = rule
    if "qk_rope_head_dim" in default:  # latent attention rotates a part of its own
        fields |= {"head_dim": 4, "num_key_value_heads": 4}
    return fields


def _rope(default: dict[str, Any], config: dict[str, Any], rope: str | None) -> dict[str, Any]:
    """Rotary factors: those of the model type, or of another type."""
    if "rope_type" not in default:  # a dict of them per type of layer
        return {k: _rope(v, config, rope) if isinstance(v, dict) else v for k, v in default.items()}
    if default["rope_type"] not in ("default", "llama3", "yarn"):
        return default
    is_latent = "qk_rope_head_dim" in config
    has_part = "partial_rotary_factor" in default and not is_latent
    kept = {"rope_type": "default", "rope_theta": default.get("rope_theta", 1e4)}
    kept |= {"partial_rotary_factor": 0.5} if has_part else {}
    if rope is None or "max_position_embeddings" not in config:
        return kept
    factors = next(one for one in ROPES if one["rope_type"] == rope)
    if rope == "longrope":
        count = (4 if is_latent else 8) // (4 if has_part else 2)
        factors = {
            **factors,
            "short_factor": [1.0] * count,
            "long_factor": [2.0**i for i in range(count)],
        }
    return {**kept, **factors}
