# SPDX-License-Identifier: Apache-2.0
"""Inputs that a model of Transformers may take, by the names of its parameters, and the tensors that it returns."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn


_SEQUENCE = 16


def inputs_of(model: Any) -> Iterator[dict[str, Any]]:
    """What a model may take as inputs, the likeliest first."""
    parameters = inspect.signature(model.forward).parameters
    text = torch.arange(3, 3 + 2 * _SEQUENCE).remainder(80).reshape(2, _SEQUENCE) + 3
    given: dict[str, Any] = {}
    main = model.main_input_name
    if main in ("input_ids", "pixel_values") and "input_ids" in parameters:
        given["input_ids"] = text
    if "decoder_input_ids" in parameters:
        given["decoder_input_ids"] = text[:, :8]
    if main == "input_ids":
        yield dict(given)
        yield {"input_ids": text, "attention_mask": torch.ones_like(text), **given}
        yield {"input_ids": torch.cat([text] * 4, dim=1), **given}
    channels, size = _find(model.config, "num_channels", 3), _find(model.config, "image_size", 32)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    mels = _find(model.config, "num_mel_bins", 80)
    positions = _find(model.config, "max_source_positions", 32)
    generator = torch.Generator().manual_seed(0)
    for name, shape in {
        "pixel_values": (2, channels, height, width),
        "pixel_values_videos": (2, _find(model.config, "num_frames", 4), channels, height, width),
        "input_features": (2, mels, 2 * positions),
        "input_values": (2, 4000),
        "past_values": (2, _find(model.config, "context_length", 32), _find(model.config, "num_input_channels", 1)),
    }.items():
        if name in parameters:
            tensor = torch.randn(shape, generator=generator)
            yield {**given, name: tensor}
            if name == "input_features":
                yield {**given, name: torch.randn(2, 64, mels, generator=generator)}
                yield {**given, name: tensor, "attention_mask": torch.ones(2, shape[-1], dtype=torch.long)}
            if name == "input_values":
                yield {**given, name: tensor[:, None]}
                yield {**given, name: torch.randn(2, 64, mels, generator=generator)}
            if name == "pixel_values":
                yield {**given, name: tensor[:, None].repeat(1, _find(model.config, "num_frames", 4), 1, 1, 1)}
    if "inputs_embeds" in parameters:
        yield {"inputs_embeds": torch.randn(2, _SEQUENCE, _find(model.config, "hidden_size", 32), generator=generator)}
    if "hidden_states" in parameters:
        yield {"hidden_states": torch.randn(2, _SEQUENCE, _find(model.config, "hidden_size", 32), generator=generator)}
    yield from _uncommon_inputs(model, text, given)


def _uncommon_inputs(model: Any, text: torch.Tensor, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Inputs of fewer model types, by the names that only these have."""
    parameters = inspect.signature(model.forward).parameters
    random = _Random()
    config = model.config
    frames, mels = 64, _find(config, "num_mel_bins", 80)
    hidden = _find(config, "hidden_size", 32)
    if "grid_thw" in parameters or "image_grid_thw" in parameters:
        yield from _patches_of_a_grid(model, parameters, random)
    if "pixel_position_ids" in parameters:
        size = config.patch_size
        side = 2 * _find(config, "pooling_kernel_size", 2)
        positions = torch.cartesian_prod(torch.arange(side), torch.arange(side)).expand(2, -1, -1)
        yield {"pixel_values": random(2, side * side, 3 * size * size), "pixel_position_ids": positions}
    if "input_features_mask" in parameters:
        for count in (frames, 2 * _find(config, "max_source_positions", frames)):
            mask = torch.ones(2, count, dtype=torch.long)
            for shape in ((2, mels, count), (2, count, mels), (2, count, _find(config, "input_size", mels))):
                yield {**given, "input_features": random(*shape), "input_features_mask": mask}
    if "audio_mel" in parameters:
        mask = torch.zeros(2, frames, dtype=torch.bool)
        yield {"audio_mel": random(2, frames, config.input_feat_size), "audio_mel_mask": mask}
    if "past_observed_mask" in parameters:
        past = _find(config, "context_length", 8) + max(config.lags_sequence)
        yield {
            "past_values": random(2, past),
            "past_time_features": random(2, past, config.num_time_features),
            "past_observed_mask": torch.ones(2, past),
            "future_values": random(2, config.prediction_length),
            "future_time_features": random(2, config.prediction_length, config.num_time_features),
        }
    if "flattened_patches" in parameters:
        patches = random(2, _SEQUENCE, model.config.vision_config.patch_embed_hidden_size + 2)
        patches[..., :2] = torch.arange(_SEQUENCE)[:, None]
        yield {**given, "flattened_patches": patches}
    if "bbox" in parameters:
        boxes = torch.arange(4).expand(2, _SEQUENCE, 4)
        yield {"input_ids": text, "bbox": boxes + torch.arange(_SEQUENCE)[:, None]}
        yield {"input_ids": text, "bbox": random(2, _SEQUENCE, getattr(config, "dim_bbox", 4))}
    if "visual_feats" in parameters:
        yield {"input_ids": text, "visual_feats": random(2, 5, config.visual_feat_dim), "visual_pos": random(2, 5, 4)}
    if "query_embeds" in parameters:
        images = random(2, 5, _find(config, "encoder_hidden_size", hidden))
        yield {"query_embeds": random(2, 8, hidden), "encoder_hidden_states": images}
    if "states" in parameters:
        yield {
            "states": random(2, 8, config.state_dim),
            "actions": random(2, 8, config.act_dim),
            "rewards": random(2, 8, 1),
            "returns_to_go": random(2, 8, 1),
            "timesteps": torch.arange(8).expand(2, 8),
            "attention_mask": torch.ones(2, 8),
        }
    if "inputs" in parameters:
        yield {"inputs": random(2, _SEQUENCE, _find(config, "d_model", hidden))}
    if "latents" in parameters:
        yield {"latents": random(2, _SEQUENCE, hidden)}
        yield {"latents": random(2, hidden, _SEQUENCE)}
    if "input_values" in parameters:
        yield {"input_values": random(2, getattr(config, "max_length", 1024), _find(config, "num_mel_bins", 128))}
        yield {"input_values": random(2, 1, 4000)}
    if "input_features" in parameters and "input_ids" in parameters:
        for shape in ((2, 1, 1024, 64), (2, mels, frames), (2, 80, frames)):
            yield {"input_ids": text, "input_features": random(*shape)}
    if "decoder_input_ids" in parameters:
        channels = _find(config, "num_channels", 1)
        yield {"input_ids": text, "decoder_input_ids": text[:, :8, None].expand(-1, -1, channels)}
    if "pixel_values" in parameters:
        yield from _uncommon_images(model, parameters, text, given, random)
    if "input_ids" in parameters:
        yield {"input_ids": text}


def _uncommon_images(
    model: Any, parameters: Mapping[str, Any], text: torch.Tensor, given: dict[str, Any], random: _Random
) -> Iterator[dict[str, Any]]:
    channels, size = _find(model.config, "num_channels", 3), _find(model.config, "image_size", 32)
    size = size if isinstance(size, int) else size[-1]
    image = random(2, channels, size, size)
    mask = torch.zeros(2, _SEQUENCE, dtype=torch.bool)
    mask[:, : _find(model.config, "latent_query_num", 4)] = True
    for name, value in {
        "qformer_input_ids": text,
        "image_embeds_position_mask": mask,
        "task_inputs": torch.ones(2, _find(model.config, "task_seq_len", 77), dtype=torch.long),
        "image_attention_mask": torch.ones(2, _SEQUENCE, 1, dtype=torch.long),
    }.items():
        if name in parameters:
            yield {**given, "pixel_values": image, name: value}
            yield {**given, "pixel_values": image[:, None], name: value}
            yield {**given, "pixel_values": image[:, None].repeat(1, 4, 1, 1, 1), name: value}
    yield {"pixel_values": random(2, 2, channels, 64, 64)}
    for height, width in ((48, 320), (224, 224), (256, 256)):
        yield {**given, "pixel_values": random(2, 3, height, width)}


def _patches_of_a_grid(model: Any, parameters: Mapping[str, Any], random: _Random) -> Iterator[dict[str, Any]]:
    """One image as a row a patch, with its grid's size in patches."""
    name = "grid_thw" if "grid_thw" in parameters else "image_grid_thw"
    main = "hidden_states" if "hidden_states" in parameters else "pixel_values"
    embedding = next(m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d)))
    shape = tuple(embedding.weight.shape[1:])
    for grid in ([[1, 4, 4]], [[1, 8, 8]]):
        rows = grid[0][1] * grid[0][2]
        thw = torch.tensor(grid)
        for pixels in (random(rows, math.prod(shape)), random(rows, *shape), random(1, rows, math.prod(shape))):
            yield {main: pixels, name: thw}


class _Random:
    """Reproducible normal numbers of a shape."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def __call__(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self._generator)


def floating_outputs(output: Any) -> list[torch.Tensor]:
    """All floating tensors in what a model returns, those of its caches not."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Mapping):
        return [t for key, value in output.items() if "past" not in key for t in floating_outputs(value)]
    if isinstance(output, (list, tuple)):
        return [t for value in output for t in floating_outputs(value)]
    return []


def _find(config: Any, name: str, default: Any) -> Any:
    """A setting of a configuration or of the first of its parts that has it."""
    found = getattr(config, name, None)
    if found is not None:
        return found
    for part in getattr(config, "sub_configs", {}):
        if getattr(config, part, None) is not None:
            found = _find(getattr(config, part), name, None)
            if found is not None:
                return found
    return default
