# SPDX-License-Identifier: Apache-2.0
"""A run of a method of training, from its arguments to the saved adapter."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
from trl import get_quantization_config

from ..callbacks import SPPGuardCallback
from ..other_libraries import without_their_future_warnings
from .arguments import Arguments, parse_arguments
from .base_report import SparsityCallback, sparsity_on_disk
from .checkpoints import AllStepsDone, StopWhenDone, check_settings, find_checkpoint, rate_of
from .data import check_sources, load_data
from .machine import check_apart, check_machine, errors_of_the_disk
from .methods import METHODS, load
from .model import BaseModel, check_model
from .processes import is_first_process
from .recipe import Recipe
from .rehearsal import rehearse


@dataclass(frozen=True)
class Run:
    """A run whose arguments, model, data and checkpoint have been found to be usable."""

    recipe: Recipe  # the method, with all arguments
    model: BaseModel  # the base model without its weights
    train_dataset: datasets.Dataset | datasets.IterableDataset  # the data to train on
    eval_dataset: datasets.Dataset | datasets.IterableDataset | None  # the data to evaluate on
    checkpoint: str | None  # the folder of the checkpoint to go on from
    warnings: Sequence[str] = ()  # what to say of the data before the run begins


def main(args: Sequence[str], method: str = "sft") -> None:
    """Fine-tune a model with SPP, as set on the command line."""
    with without_their_future_warnings():
        run = prepare(parse_arguments(args, METHODS[method]))
        if is_first_process():
            print(_describe(run), file=sys.stderr)
        if not run.recipe.arguments.spp.dry_run:
            train(run)


def prepare(arguments: Arguments) -> Run:
    """Check everything that can be checked before the model is loaded, and load the data."""
    training: Any = arguments.training
    recipe: Recipe = load(arguments.method.recipe)(arguments)
    check_machine(training)
    teacher = getattr(arguments.spp, "teacher_model_name_or_path", None)
    check_apart(str(training.output_dir), (arguments.model.model_name_or_path, teacher))
    check_sources(arguments.script, arguments.mixture)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, str(training.output_dir))
    recipe.check()
    config = arguments.spp.to_config(arguments.method.task_type)
    if checkpoint is not None:
        check_settings(checkpoint, config)
    model = check_model(arguments.model, config, training.trust_remote_code)
    recipe.check_model(model)
    train_dataset, eval_dataset = load_data(
        arguments.script, arguments.mixture, training, recipe.columns, recipe.needs
    )
    for dataset in (train_dataset, eval_dataset):
        if dataset is not None:
            recipe.check_data(next(iter(dataset)))
    warned = rehearse(recipe, model, train_dataset, eval_dataset)
    return Run(recipe, model, train_dataset, eval_dataset, checkpoint, warned)


def train(run: Run) -> None:
    """Train the adapter, and save it and push it as the arguments say."""
    method, script, _, model, _, spp = run.recipe.arguments
    training: Any = run.recipe.arguments.training
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
    trainer_class = run.recipe.trainer_class()
    with warnings.catch_warnings():
        # the callback reports the same, next to what is sparse
        warnings.filterwarnings("ignore", message=".*so SPP has nothing to preserve")
        trainer = trainer_class(
            model=str(model.model_name_or_path),
            args=training,
            train_dataset=run.train_dataset,
            eval_dataset=run.eval_dataset,
            quantization_config=get_quantization_config(model),
            peft_config=spp.to_config(method.task_type),
            callbacks=[guard, SparsityCallback(guard), StopWhenDone()],
            **run.recipe.trainer_arguments(),
        )
    with errors_of_the_disk(Path(training.output_dir)):
        try:
            trainer.train(resume_from_checkpoint=run.checkpoint)
        except AllStepsDone:  # the adapter is that of the checkpoint by then
            if training.load_best_model_at_end and trainer.state.best_model_checkpoint is not None:
                trainer._load_best_model()
        trainer.save_model(training.output_dir)
    trainer.accelerator.print(f"The adapter is in {training.output_dir}.", file=sys.stderr)
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    # Transformers 5.18 and later close trackers and process groups on request
    if hasattr(trainer, "end"):
        trainer.end()


def _describe(run: Run) -> str:
    rows = len(run.train_dataset) if isinstance(run.train_dataset, datasets.Dataset) else "streamed"
    arguments = run.recipe.arguments
    name = arguments.model.model_name_or_path
    lines = [
        f"Model:      {name}",
        f"Adapter:    SPP on {len(run.model.layers)} layers, {run.model.trainable:,} trainable parameters of "
        f"{run.model.total:,}",
        f"Data:       {rows} rows",
        *run.warnings,
        *_rate_lines(arguments, run.checkpoint),
        *run.recipe.lines,
        f"Checkpoint: {run.checkpoint or 'none, from the first step'}",
        f"Output:     {arguments.training.output_dir}",
    ]
    # a run says it once it has loaded the model
    found = sparsity_on_disk(str(name), run.model.layers) if arguments.spp.dry_run else None
    return "\n".join([*lines, *(found.lines() if found else ())])


def _rate_lines(arguments: Arguments, checkpoint: str | None) -> list[str]:
    """The learning rate, and a warning if it is not the one asked for, or TRL's default, or less."""
    training: Any = arguments.training
    asked, default = training.learning_rate, type(training).learning_rate
    kept = rate_of(checkpoint) if checkpoint is not None else None
    rate = asked if kept is None else kept
    lines = [f"Rate:       {rate:g}"]
    if rate != asked:
        lines.append(
            f"Warning: --learning_rate {asked:g} has no effect: a resumed run keeps the rate of its checkpoint. Train "
            "into another --output_dir to change it."
        )
    if 0 < rate <= default:
        lines.append(
            f"Warning: SPP learns next to nothing at a learning rate of {rate:g} (TRL's default is {default:g}): its "
            f"factors multiply small weights. Pass --learning_rate, {arguments.method.start_rate:g} to start from."
        )
    return lines
