# SPDX-License-Identifier: Apache-2.0
"""
A tiny model of every class of Transformers that can be built from its configuration alone.

The default configuration of a model type is shrunk by the names of its settings; what Transformers then cannot build
or run says so itself, and a sweep records the reason.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto as auto

from helpers.model_settings import SETTINGS, merged


# Larger ones are not tiny: the shrinking missed a setting.
MOST_PARAMETERS = 25_000_000
_VOCABULARY = 160
_FIRST_SPECIAL_TOKEN = 100

_SIZES = {
    32: """
        hidden_size d_model n_embd dim encoder_hidden_size decoder_hidden_size text_hidden_size word_embed_proj_dim
        out_hidden_size audio_hidden_size projector_hidden_size cross_hidden_size decoder_n_embd
        attention_hidden_size vision_hidden_size hidden_dim hidden_size_global encoder_hidden_dim embed_dim
        embedding_size pooler_hidden_size backbone_hidden_size emb_dim projection_dim project_dim projection_size
        condition_dim lru_width head_hidden_size mm_embed_dim audio_embed_dim patch_embed_hidden_size
        image_text_hidden_size model_dim adapter_out_dim adapter_in_dim d_inner_proj output_hidden_size
        fusion_hidden_size output_dim
    """,
    48: """
        intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff mlp_dim n_inner d_inner moe_intermediate_size
        shared_expert_intermediate_size intermediate_size_mlp ffn_hidden_size decoder_intermediate_size
        dense_intermediate_size shared_intermediate_size dim_feedforward encoder_feedforward_dim
        speech_encoder_intermediate_size t2u_encoder_ffn_dim dim_ff dff t2u_decoder_ffn_dim
        projection_intermediate_size projector_intermediate_size share_expert_dim shared_experts_intermediate_size
        moe_shared_expert_intermediate_size alignment_intermediate_size moe_hidden_size encoder_linear_units
        decoder_linear_units memory_attention_feed_forward_hidden_size resampler_mlp_intermediate_size
        mit_intermediate_size pair_transition_intermediate_size
    """,
    4: """
        num_attention_heads n_head n_heads num_heads encoder_attention_heads attention_heads decoder_attention_heads
        encoder_num_attention_heads decoder_num_attention_heads resampler_n_heads speech_encoder_attention_heads
        t2u_encoder_attention_heads t2u_decoder_attention_heads cross_num_attention_heads swa_num_attention_heads
        num_sliding_attention_heads resampler_heads num_experts n_routed_experts num_local_experts moe_num_experts
        linear_num_heads decoder_self_attention_heads decoder_cross_attention_heads conf_num_attention_heads
    """,
    2: """
        num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts
    """,
    1: """
        n_group topk_group num_expert_group first_k_dense_replace num_nextn_predict_layers
    """,
    8: """
        kv_lora_rank q_lora_rank qk_rope_head_dim qk_nope_head_dim v_head_dim head_dim d_kv d_head swa_head_dim
        kv_channels linear_key_head_dim linear_value_head_dim linear_head_dim attention_head_dim cross_head_dim
        dim_head index_head_dim resampler_head_dim o_lora_rank hidden_size_per_layer_input laurel_rank index_topk
        resampler_dim_head mamba_d_head mamba_head_dim mamba_d_state state_size ssm_state_size mamba_dt_rank
        time_step_rank num_query_tokens resampler_n_latents num_queries num_denoising num_latents
    """,
}
_BY_NAME = {name: size for size, names in _SIZES.items() for name in names.split()}
_DROPPED = {
    *("transformers_version", "architectures", "dtype", "torch_dtype"),
    "per_layer_config",
    *("out_features", "out_indices", "_out_features", "_out_indices", "stage_names"),
}
# What has no default, and is needed.
_UNSET = {
    "vocab_size": _VOCABULARY,
    "num_experts_per_tok": 2,
    "prediction_length": 8,
    "attn_layer_indices": [1],
    "pad_token_id": 0,
}
_LAYERS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers", "depth", "layers"),
    *("num_decoder_layers", "speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers", "num_blocks"),
    *("encoder_num_hidden_layers", "decoder_num_hidden_layers", "num_global_layers", "resampler_depth"),
    *("num_encoder_layers", "memory_attention_num_layers", "conf_num_hidden_layers", "num_spatial_layers"),
    *("folding_trunk_num_hidden_layers", "mit_num_hidden_layers", "num_layers_per_stack", "num_temporal_layers"),
)
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "kv_n_heads")
_CAPS = {
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_source_positions", "max_target_positions"), 64),
    **dict.fromkeys(("t2u_max_position_embeddings", "max_seq_len", "max_sequence_length", "seq_len", "n_ctx"), 64),
    **dict.fromkeys(("num_filters", "audio_channels", "stem_channels", "upsample_initial_channel"), 32),
    **dict.fromkeys(("codebook_size", "num_embeddings", "codebook_dim", "classifier_proj_size", "conv_dim"), 64),
    **dict.fromkeys(("sliding_window", "attention_window", "attention_chunk_size", "num_patches"), 64),
    **dict.fromkeys(("rotary_dim", "num_groups", "upsample_groups"), 4),
    "mamba_d_ssm": 64,
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), 8),
}


def model_types() -> list[str]:
    """Every `model_type` that Transformers has an auto class of models for."""
    return sorted(
        name for name in CONFIG_MAPPING if any(name in names for names in (auto.MODEL_MAPPING_NAMES, *_HEADS))
    )


def causal_model_types() -> list[str]:
    """Every model type that Transformers has a causal language model for."""
    return [name for name in model_types() if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]


def model_class(model_type: str) -> type[nn.Module]:
    """The class to build: with a language model's head if there is one, or else the bare model."""
    found = []
    for names in (*_HEADS, auto.MODEL_MAPPING_NAMES):
        if model_type in names:
            name = names[model_type]
            found.append(getattr(transformers, name if isinstance(name, str) else name[0]))
    # for a multimodal type, the mapping of language models names the class of its text model
    return next((cls for cls in found if cls.config_class is CONFIG_MAPPING[model_type]), found[0])


def tiny_config(model_type: str) -> Any:
    """The configuration of a model type, shrunk."""
    default = CONFIG_MAPPING[model_type]()
    return type(default)(**merged(_shrunk(default.to_dict(), {}), SETTINGS.get(model_type, {})))


def build(model_type: str, seed: int = 0) -> nn.Module:
    """
    A tiny random model of a type, in eval mode.

    Raises:
        Exception: Whatever Transformers raises where it cannot be built like this.
    """
    config = tiny_config(model_type)
    cls = model_class(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in cls(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"it has {size:,} parameters where all known settings are small")
    torch.manual_seed(seed)
    return cls(config).eval()


def _shrunk(settings: dict[str, Any], tokens: dict[int, int]) -> dict[str, Any]:
    before = next((settings[name] for name in _LAYERS if isinstance(settings.get(name), int)), None)
    layers = _layers_to_keep(settings, before)
    small: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _DROPPED:
            continue
        if not isinstance(name, str):
            small[name] = value
        elif value is None and name in _UNSET:
            small[name] = _UNSET[name]
        elif isinstance(value, dict):
            small[name] = _shrunk(value, tokens)
        elif isinstance(value, list) and before is not None and len(value) == before and before > 3:
            small[name] = value[:layers]
        elif isinstance(value, bool) or not isinstance(value, int):
            small[name] = _shrunk_list(name, value) if isinstance(value, (list, tuple)) else value
        elif name in _LAYERS:
            small[name] = min(value, layers)
        elif name in _KEY_VALUE_HEADS:
            small[name] = 2 if value < (settings.get("num_attention_heads") or value) else 4
        elif name in _BY_NAME:
            small[name] = min(value, _BY_NAME[name])
        elif name in _CAPS:
            small[name] = min(value, _CAPS[name])
        elif name.endswith("vocab_size"):
            small[name] = min(value, _VOCABULARY)
        elif name.endswith(("_token_id", "_token_index", "token_id", "_bos_id", "_eos_id")) and value >= 64:
            small[name] = tokens.setdefault(value, _FIRST_SPECIAL_TOKEN + len(tokens))
        elif name == "image_size":
            patch = settings.get("patch_size")
            small[name] = 4 * patch if isinstance(patch, int) and patch >= 8 else min(value, 64)
        else:
            small[name] = value
    return small


def _layers_to_keep(settings: dict[str, Any], layers: int | None) -> int:
    """Two, or as many as it takes to have a layer of each kind."""
    keep = 2
    for value in settings.values():
        if isinstance(value, list) and layers is not None and len(value) == layers:
            if all(isinstance(kind, str) for kind in value):
                keep = max([keep, *(value.index(kind) + 1 for kind in set(value))])
    for period in ("attn_layer_period", "full_attention_interval", "layer_group_size", "sliding_window_pattern"):
        if isinstance(settings.get(period), int):
            keep = max(keep, settings[period])
    return min(keep, 8)


def _shrunk_list(name: str, value: Any) -> Any:
    if name in ("num_heads", "num_attention_heads") and value:
        return [2 ** (index + 1) for index in range(len(value))]
    if name == "mrope_section":
        return [2, 1, 1]
    if name in ("depths", "num_blocks", "blocks_per_stage", "layers_per_stage"):
        return [min(number, 2) for number in value]
    if name in ("hidden_sizes", "encoder_hidden_sizes", "embed_dims", "embed_dim_per_stage") and value:
        return [16 * 2 ** min(index, 3) for index in range(len(value))]
    if name == "conv_dim" and value and all(isinstance(number, int) for number in value):
        return [32 for _ in value]
    if name == "image_size" and value and all(isinstance(number, int) for number in value):
        return [64 for _ in value]
    return value


_HEADS = (
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)
