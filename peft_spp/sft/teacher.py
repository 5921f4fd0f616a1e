# SPDX-License-Identifier: Apache-2.0
"""Distillation: to learn another model's predictions of the text, by default those of the dense parent."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.models import prepare_deepspeed

from ..checkpoints.hub import local_folder
from ..error_text import one_line
from .errors import InputError
from .model import check_weights, model_class
from .trainer import Carded


TOKENS_AT_ONCE = 512
"""Distributions of the next token are compared for so many tokens at a time: 128,000 words in float32 take 262 MB."""


class DistillationSFTTrainer(Carded, SFTTrainer):
    """
    An `SFTTrainer` whose loss is KL(teacher ‖ model) of the next token's distribution, in the mean over all tokens
    that the data has a label for.

    TRL's own `DistillationTrainer` lets the model write the text (on-policy), which a freshly pruned model does badly.

    Args:
        teacher (`PreTrainedModel`): A model with the same vocabulary.
    """

    def __init__(self, *args: Any, teacher: PreTrainedModel, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        frozen = teacher.requires_grad_(False).eval()
        self.teacher: nn.Module = (
            prepare_deepspeed(frozen, self.accelerator)
            if self.is_deepspeed_enabled
            else self.accelerator.prepare_model(frozen, evaluation_mode=True)
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        text = {name: value for name, value in inputs.items() if name != "labels"} | {"use_cache": False}
        with torch.no_grad():
            wanted = self.teacher(**text).logits
        outputs = model(**text)
        learned = inputs["labels"][:, 1:] != -100
        total = divergence(outputs.logits[:, :-1][learned], wanted[:, :-1][learned])
        count = learned.sum() if num_items_in_batch is None else num_items_in_batch
        loss = total / torch.as_tensor(count, device=total.device).clamp(min=1)
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # the count is of the tokens of all processes, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss


def divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    """
    The sum over tokens of KL(wanted ‖ scores) of logits, in float32. Only the logits are kept for the backward pass.
    """
    parts = zip(scores.split(TOKENS_AT_ONCE), wanted.split(TOKENS_AT_ONCE), strict=True)
    total = scores.new_zeros((), dtype=torch.float32)
    for part, wanted_part in parts:
        total = total + cast(Tensor, checkpoint(_divergence, part, wanted_part, use_reentrant=False))
    return total


def _divergence(scores: Tensor, wanted: Tensor) -> Tensor:
    return F.kl_div(scores.float().log_softmax(-1), wanted.float().log_softmax(-1), reduction="sum", log_target=True)


def check_teacher(name: str, training: SFTConfig, student: PretrainedConfig, revision: str | None) -> None:
    """Check by its configuration that a teacher is there and has the vocabulary of the model."""
    if training.label_smoothing_factor or training.loss_type not in ("nll", "chunked_nll"):
        raise InputError(
            "--teacher_model_name_or_path replaces the loss: pass it without --label_smoothing_factor and --loss_type."
        )
    source = {"revision": revision, "trust_remote_code": training.trust_remote_code}
    try:
        local_folder(name, revision=revision, allow=("*.json", "*.py"))
        config = AutoConfig.from_pretrained(name, **source)
    except (OSError, ValueError) as error:
        raise InputError(f"The teacher {name!r} cannot be loaded: {one_line(error)}") from error
    sizes = (config.get_text_config().vocab_size, student.get_text_config().vocab_size)
    if sizes[0] != sizes[1]:
        raise InputError(
            f"The teacher {name!r} predicts {sizes[0]} tokens and the model {sizes[1]}. Use a teacher with the "
            "model's vocabulary, such as the model before it was pruned."
        )
    check_weights(name)


def load_teacher(name: str, revision: str | None, settings: dict[str, Any]) -> PreTrainedModel:
    """Load a teacher, of the class that its configuration names."""
    source = {"revision": revision, "trust_remote_code": settings["trust_remote_code"]}
    config = AutoConfig.from_pretrained(name, **source)
    return cast(PreTrainedModel, model_class(config).from_pretrained(name, **settings, revision=revision))
