# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft` itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import datasets  # type: ignore[import-untyped]
from peft import PeftModel
from trl import SFTTrainer, get_quantization_config

from ..model_card import update_model_card
from ..tuner import SPPConfig
from .arguments import Arguments, parse_arguments
from .checkpoints import find_checkpoint
from .data import check_sources, load_data
from .errors import InputError
from .model import AdapterSize, check_model


@dataclass(frozen=True)
class Run:
    """
    A run whose arguments, model, data and checkpoint have been found to be usable.

    Args:
        arguments (`Arguments`): All arguments.
        size (`AdapterSize`): The size of the adapter.
        train_dataset (`Dataset` or `IterableDataset`): The data to train on.
        eval_dataset (`Dataset` or `IterableDataset`, *optional*): The data to evaluate on.
        checkpoint (`str`, *optional*): The folder of the checkpoint to go on from.
    """

    arguments: Arguments
    size: AdapterSize
    train_dataset: datasets.Dataset | datasets.IterableDataset
    eval_dataset: datasets.Dataset | datasets.IterableDataset | None
    checkpoint: str | None


class CardedSFTTrainer(SFTTrainer):
    """An `SFTTrainer` whose model cards, also those it pushes, say how an SPP adapter is loaded."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            # TRL takes the adapter for a whole model of Transformers
            model, folder = cast(PeftModel, self.model), str(self.args.output_dir)
            model.create_or_update_model_card(folder)
            update_model_card(folder, cast(SPPConfig, model.peft_config["default"]))


def main(args: Sequence[str], prog: str = "peft-spp sft") -> int:
    """
    Fine-tune a model with SPP, as the command line says.

    Args:
        args (`Sequence[str]`): The command line, without the name of the program.
        prog (`str`): The name of the program, for the help.

    Returns:
        `int`: The exit code: 0, or 2 if arguments, data, model or checkpoint cannot be used; nothing has been trained
        or written then. An error of the training itself is raised.
    """
    try:
        run = prepare(parse_arguments(args, prog))
    except InputError as error:
        if _is_first_process():
            print(f"Error: {error}", file=sys.stderr)
        return 2
    if _is_first_process():
        print(_describe(run), file=sys.stderr)
    if not run.arguments.spp.dry_run:
        train(run)
    return 0


def prepare(arguments: Arguments) -> Run:
    """
    Check everything that can be checked before the model is loaded, and load the data.

    Args:
        arguments (`Arguments`): All arguments.

    Returns:
        `Run`: For [`train`].

    Raises:
        InputError: If data, model or checkpoint cannot be used.
    """
    training = arguments.training
    check_sources(arguments.script, arguments.mixture)
    checkpoint = find_checkpoint(training.resume_from_checkpoint, str(training.output_dir))
    size = check_model(arguments.model, arguments.spp.to_config(), training.trust_remote_code)
    train_dataset, eval_dataset = load_data(arguments.script, arguments.mixture, training)
    return Run(arguments, size, train_dataset, eval_dataset, checkpoint)


def train(run: Run) -> None:
    """
    Train the adapter, and save it and push it as the arguments say.

    Args:
        run (`Run`): What [`prepare`] gave.
    """
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
    trainer = CardedSFTTrainer(
        model=str(model.model_name_or_path),
        args=training,
        train_dataset=run.train_dataset,
        eval_dataset=run.eval_dataset,
        quantization_config=get_quantization_config(model),
        peft_config=spp.to_config(),
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
    layers, trainable, total = run.size
    rows = len(run.train_dataset) if isinstance(run.train_dataset, datasets.Dataset) else "streamed"
    lines = (
        f"Model:      {run.arguments.model.model_name_or_path}",
        f"Adapter:    SPP on {layers} layers, {trainable:,} trainable parameters of {total:,}",
        f"Data:       {rows} rows",
        f"Checkpoint: {run.checkpoint or 'none, from the first step'}",
        f"Output:     {run.arguments.training.output_dir}",
    )
    return "\n".join(lines)


def _is_first_process() -> bool:
    """Whether this process is the one to print, as a launcher's environment says."""
    return os.environ.get("RANK", "0") == "0"
