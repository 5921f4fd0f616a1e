# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft` itself."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
from trl import get_quantization_config

from ..callbacks import SPPGuardCallback
from ..other_libraries import without_their_future_warnings
from .arguments import Arguments, parse_arguments
from .base_report import SparsityCallback, sparsity_on_disk
from .checkpoints import find_checkpoint
from .data import check_sources, load_data
from .machine import check_machine
from .model import BaseModel, check_model
from .processes import is_first_process
from .rehearsal import rehearse
from .teacher import DistillationSFTTrainer, check_teacher, load_teacher
from .trainer import CardedSFTTrainer


@dataclass(frozen=True)
class Run:
    """
    A run whose arguments, model, data and checkpoint have been found to be usable.

    Args:
        arguments (`Arguments`): All arguments.
        model (`BaseModel`): The base model without its weights.
        train_dataset (`Dataset` or `IterableDataset`): The data to train on.
        eval_dataset (`Dataset` or `IterableDataset`, *optional*): The data to evaluate on.
        checkpoint (`str`, *optional*): The folder of the checkpoint to go on from.
    """

    arguments: Arguments
    model: BaseModel
    train_dataset: datasets.Dataset | datasets.IterableDataset
    eval_dataset: datasets.Dataset | datasets.IterableDataset | None
    checkpoint: str | None


def main(args: Sequence[str], prog: str = "peft-spp sft") -> None:
    """Fine-tune a model with SPP, as set on the command line."""
    with without_their_future_warnings():
        run = prepare(parse_arguments(args, prog))
        if is_first_process():
            print(_describe(run), file=sys.stderr)
        if not run.arguments.spp.dry_run:
            train(run)


def prepare(arguments: Arguments) -> Run:
    """Check everything that can be checked before the model is loaded, and load the data."""
    training = arguments.training
    check_machine(training)
    check_sources(arguments.script, arguments.mixture)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, str(training.output_dir))
    model = check_model(arguments.model, arguments.spp.to_config(), training.trust_remote_code)
    if arguments.spp.teacher_model_name_or_path:
        name, revision = arguments.spp.teacher_model_name_or_path, arguments.spp.teacher_model_revision
        check_teacher(name, training, model.adapted.config, revision)
    train_dataset, eval_dataset = load_data(arguments.script, arguments.mixture, training)
    rehearse(model, training, train_dataset, eval_dataset)
    return Run(arguments, model, train_dataset, eval_dataset, checkpoint)


def train(run: Run) -> None:
    """Train the adapter, and save it and push it as the arguments say."""
    script, training, model, _, spp = run.arguments
    # TRL has parsed a JSON string into a dict
    given = cast(dict[str, Any] | None, training.model_init_kwargs)
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(given or {}),
    }
    guard = SPPGuardCallback(spp.spp_check_base_steps)
    trainer_class: Any = CardedSFTTrainer
    if spp.teacher_model_name_or_path:
        settings = {"trust_remote_code": training.trust_remote_code, "attn_implementation": model.attn_implementation}
        settings |= {"dtype": training.model_init_kwargs["dtype"]}
        teacher = load_teacher(spp.teacher_model_name_or_path, spp.teacher_model_revision, settings)
        trainer_class = partial(DistillationSFTTrainer, teacher=teacher)
    with warnings.catch_warnings():
        # the callback reports the same, next to what is sparse
        warnings.filterwarnings("ignore", message=".*so SPP has nothing to preserve")
        trainer = trainer_class(
            model=str(model.model_name_or_path),
            args=training,
            train_dataset=run.train_dataset,
            eval_dataset=run.eval_dataset,
            quantization_config=get_quantization_config(model),
            peft_config=spp.to_config(),
            callbacks=[guard, SparsityCallback(guard)],
        )
    trainer.train(resume_from_checkpoint=run.checkpoint)
    trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"The adapter is in {training.output_dir}.", file=sys.stderr)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    # Transformers 5.18 and later close trackers and process groups on request
    if hasattr(trainer, "end"):
        trainer.end()


def _describe(run: Run) -> str:
    trainable, total = run.model.adapted.get_nb_trainable_parameters()
    rows = len(run.train_dataset) if isinstance(run.train_dataset, datasets.Dataset) else "streamed"
    name = run.arguments.model.model_name_or_path
    lines = [
        f"Model:      {name}",
        f"Adapter:    SPP on {len(run.model.layers)} layers, {trainable:,} trainable parameters of {total:,}",
        f"Data:       {rows} rows",
        *([f"Teacher:    {teacher}"] if (teacher := run.arguments.spp.teacher_model_name_or_path) else []),
        f"Checkpoint: {run.checkpoint or 'none, from the first step'}",
        f"Output:     {run.arguments.training.output_dir}",
    ]
    # a run says it once it has loaded the model
    found = sparsity_on_disk(str(name), run.model.layers) if run.arguments.spp.dry_run else None
    return "\n".join([*lines, *(found.lines() if found else ())])
