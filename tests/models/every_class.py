"""Every causal architecture of transformers as a tiny random model, as far as one table of sizes builds it."""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from helpers.models.teachers import Teacher
from tests import tiny

TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 5_000_000  # parameters

_BY_SIZE = {
    16: "hidden_size n_embd d_model emb_dim embedding_size word_embed_proj_dim n_inner lru_width embedding_dim",
    24: "intermediate_size ffn_dim ffn_hidden_size dff dim_ff d_inner intermediate_size_mlp shared_intermediate_size "
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "feed_forward_size shared_experts_intermediate_size dense_intermediate_size moe_shared_expert_intermediate_size",
    2: "num_hidden_layers n_layer n_layers decoder_layers encoder_layers num_layers num_attention_heads n_head n_heads "
    "num_heads decoder_attention_heads encoder_attention_heads num_key_value_heads num_kv_heads num_experts_per_tok "
    "moe_k moe_topk linear_num_key_heads linear_num_value_heads topk_group num_experts_per_token",
    64: "vocab_size vocab_size_per_layer_input decoder_vocab_size sliding_window window_size original_max_positions",
    8: "head_dim global_head_dim q_lora_rank kv_lora_rank linear_key_head_dim linear_value_head_dim v_head_dim "
    "attention_head_dim num_experts num_local_experts n_routed_experts moe_num_experts dim_head dim_model_base "
    "hidden_size_per_layer_input laurel_rank index_head_dim swa_head_dim linear_head_dim rotary_dim mamba_d_state",
    4: "qk_nope_head_dim qk_rope_head_dim n_group mamba_n_heads index_topk",
    1: "n_shared_experts first_k_dense_replace moe_num_shared_experts moe_layer_start_index num_dense_layers",
    0: "num_kv_shared_layers pad_token_id",
    128: "max_position_embeddings n_positions n_ctx max_seq_len",
}
_SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}
_TWEAKS = {
    "cohere": dict(logit_scale=0.3), "cohere2": dict(logit_scale=0.3), "granite": dict(logits_scaling=6.0),
    "granitemoe": dict(logits_scaling=6.0), "gemma2": dict(final_logit_softcapping=0.5, query_pre_attn_scalar=8),
    "falcon_h1": dict(lm_head_multiplier=0.1, mamba_d_ssm=32, mamba_d_head=8), "hyperclovax": dict(logits_scaling=0.2),
    "nanochat": dict(final_logit_softcapping=0.5), "granitemoehybrid": dict(layer_types=["full_attention"] * 2),
    "mixtral": dict(sliding_window=None), "deepseek_v3": dict(num_key_value_heads=2), "gpt_neo": dict(attention_types=[
        [["global"], 2]]),
    "codegen": dict(num_attention_heads=4, rotary_dim=4), "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1), "zaya": dict(num_experts_per_tok=1),
    "longcat_flash": dict(num_key_value_heads=2, head_dim=4), "zamba2": dict(layers_block_type=["mamba", "hybrid"]),
    "zamba": dict(num_hidden_layers=3, layer_types=["linear_attention", "hybrid", "hybrid"]),
    "mamba2": dict(num_heads=4, n_groups=2),
    "cohere_compass_text": dict(layer_types=["full_attention"] * 2, rope_parameters={
        "full_attention": {"rope_type": "default", "rope_theta": 1e4}}),
    "dbrx": dict(rope_theta=1e4, moe_top_k=2, clip_qkv=8.0),
    "dots3_note": dict(per_layer_config=None, adapter_in_dim=16),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "xmod": dict(default_language="en_XX"), "mimo_v2_flash": dict(num_key_value_heads=1),
    "roc_bert": dict(is_decoder=True, pronunciation_vocab_size=64, shape_vocab_size=64),
}  # fmt: skip


def config_of(kind: str, cls: type | None = None):
    """A small configuration of a model type; nested ones get small parts."""
    cls = cls or getattr(transformers, CONFIG_MAPPING_NAMES[kind])
    parts = {name: getattr(cls(), name, None) for name in getattr(cls, "sub_configs", {})}
    nested = {name: config_of(kind, type(part)) for name, part in parts.items() if part is not None}
    known = {**cls.__dataclass_fields__, **getattr(cls, "attribute_map", {})}
    sizes = {} if "text_config" in nested else {name: size for name, size in _SIZES.items() if name in known}
    special = {name: i for i, name in enumerate(("bos_token_id", "eos_token_id"), 1) if name in known}
    return cls(**nested, **{**sizes, **special, **_TWEAKS.get(kind, {})})


def teacher(kind: str) -> Teacher:
    """A tiny model of the type with weights large enough that every path matters."""
    torch.manual_seed(0)
    config = config_of(kind)
    build = transformers.AutoModelForCausalLM.from_config
    with torch.device("meta"):
        size = sum(p.numel() for p in build(config).parameters())
    if size > LARGEST:
        raise OverflowError(f"{size:,} parameters")
    model = build(config_of(kind)).eval().requires_grad_(False)
    chosen_by = (each for name, each in model.named_buffers() if "correction" in name or "expert_bias" in name)
    for tensor in (*model.parameters(), *chosen_by):
        tensor.add_(0.2 * torch.randn_like(tensor))
    return Teacher(kind, kind, model, tiny.tokenizer(bos=False))
