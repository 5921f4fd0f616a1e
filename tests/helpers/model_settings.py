# SPDX-License-Identifier: Apache-2.0
"""Settings of tiny models by model type, where shrinking the default configuration by names does not build one."""

from __future__ import annotations

from typing import Any


_MROPE = {"rope_parameters": {"mrope_section": [2, 1, 1]}}
_MROPE_OF_HALF = {"rope_parameters": {"mrope_section": [1, 1, 0]}}
_HEAD_DIM = {"head_dim": 8}
_SWIN = {"embed_dim": 32, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "image_size": 64}
_SWIN_OF_FOUR = {**_SWIN, "depths": [1, 1, 1, 1], "num_heads": [2, 4, 8, 16]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_TINY_DECODER = {"latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1], "resolution": 32}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "ngram_vocab_size_base": 64,
}
_DENSE_AND_SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
_SAM = {
    "prompt_encoder_config": {"image_size": 64, "hidden_size": 32, "mask_input_channels": 4},
    "vision_config": {"image_size": 64, "output_channels": 32, "window_size": 2, "global_attn_indexes": [1]},
    "mask_decoder_config": {"hidden_size": 32, "vit_dim": 32},
}
_LINEAR_AND_FULL = ["linear_attention", "full_attention"]
_ZAMBA = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}

# Merged into the shrunk configuration; lists and plain values replace what is there.
SETTINGS: dict[str, dict[str, Any]] = {
    "align": {"vision_config": {"width_coefficient": 0.25, "depth_coefficient": 0.3}},
    "aria": {"projector_patch_to_query_dict": {16: 4}, "vision_config": {"image_size": 56, "patch_size": 14}},
    "blip-2": {"image_token_index": 100},
    "blt": {"encoder_hash_byte_group_vocab": 100, "use_cache": False},
    "bridgetower": {"vision_config": {"hidden_size": 64}},
    "bros": {"dim_bbox_projection": 8},
    "chameleon": {"vocabulary_map": {"<image>": 100}, "vq_config": _TINY_DECODER},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_ocr2": {"text_config": _DENSE_AND_SPARSE},
    "dia": {"decoder_config": {"cross_num_key_value_heads": 4}},
    "diffusion_gemma": {"text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3},
    "emu3": {"vocabulary_map": {"<image>": 100, "<|extra_200|>": 101}, "vq_config": _TINY_DECODER},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [48, 32]}},
    "florence2": {"vision_config": {"embed_dim": [16, 32, 64, 128], "num_groups": [2, 4, 8, 16]}},
    "donut-swin": _SWIN,
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "glm46v": {"text_config": _MROPE},
    "glm4v": {"text_config": _MROPE},
    "glm4v_moe": {"text_config": _MROPE_OF_HALF},
    "glm4v_moe_text": _MROPE_OF_HALF,
    "glm4v_text": _MROPE,
    "glm5_next": {"text_config": {"index_kpool": 4}},
    "glm5_next_text": {"index_kpool": 4},
    "glm_image": {"text_config": _MROPE},
    "glm_image_text": _MROPE,
    "glm_ocr": {"text_config": _MROPE},
    "glm_ocr_text": _MROPE,
    "glmga": {"text_config": _MROPE},
    "granite4_vision": {"deepstack_layer_map": [[-1, 1]], "downsample_rate": "1/2"},
    "granite_speech5_ctc": {"encoder_config": {"context_size": 16}},
    "granite_speech5_encoder": {"context_size": 16},
    "granitemoehybrid": {"layer_types": _LINEAR_AND_FULL},
    "grounding-dino": {"backbone_config": _SWIN},
    "hrm_text": {"use_cache": False},
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM,
    "hunyuan_vl": {"text_config": {**_HEAD_DIM, **_MROPE}},
    "hunyuan_vl_text": {**_HEAD_DIM, **_MROPE},
    "informer": {"prediction_length": 8},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "janus": {"vq_config": {**_TINY_DECODER, "image_token_embed_dim": 32}},
    "kosmos-2": {"latent_query_num": 4},
    "layoutlmv3": {"coordinate_size": 6, "shape_size": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},
    "longcat_flash": {"expert_ffn_hidden_size": 48, "zero_expert_num": 2, "qk_head_dim": 16},
    "mamba2": {"num_heads": 8},
    "mask2former": {"backbone_config": _SWIN_OF_FOUR},
    "ministral": _HEAD_DIM,
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
    "oneformer": {"backbone_config": _SWIN_OF_FOUR},
    "paddleocr_vl": {"text_config": _MROPE},
    "perceiver": {"d_latents": 32, "num_blocks": 1, "num_self_attends_per_block": 2},
    "qwen2_5_omni_thinker": {"text_config": _MROPE},
    "qwen2_5_vl": {"text_config": _MROPE},
    "qwen2_5_vl_text": _MROPE,
    "qwen2_vl": {"text_config": _MROPE},
    "qwen2_vl_text": _MROPE,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "feed_forward_size": 48,
        "attention_head_size": 8,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "sam": _SAM,
    "sam_hq": _SAM,
    "swin": _SWIN,
    "xmod": {"default_language": "en_XX"},
    "zamba": _ZAMBA,
    "zamba2": {
        **_ZAMBA,
        "hybrid_layer_ids": [1, 3],
        "mamba_headdim": 8,
    },
}


def merged(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`settings` with `changes` merged into each of their parts."""
    result = dict(settings)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(result.get(name), dict) and "projector" not in name
        result[name] = merged(result[name], value) if both else value
    return result
