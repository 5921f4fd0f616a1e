# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    device: torch.device,
    *,
    adapter: Path | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """
    Evaluate a saved model on tasks, zero-shot.

    Under `accelerate launch` every process has to call it; the harness divides the work among them.

    Args:
        source (`str`): The model's folder or repository on the Hub.
        tasks (`Sequence[str]`): The tasks by the harness' names.
        device (`torch.device`): The device.
        adapter (`Path`, *optional*): The folder of an adapter of PEFT that is used without merging it.
        task_folder (`Path`, *optional*): A folder with more tasks, as YAML files.
        limit (`int`, *optional*): Only the first examples of each task, to try it.

    Returns:
        `dict[str, dict[str, float]]`: By task the metrics that the harness gives, without their standard errors;
            empty on all processes but the first.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            'Tasks are evaluated by lm-evaluation-harness: pip install "peft-spp[quality]" installs it.'
        ) from error
    arguments: dict[str, Any] = {"pretrained": source, "dtype": "auto"}
    if adapter is not None:
        arguments["peft"] = str(adapter)
    manager = TaskManager(include_path=str(task_folder) if task_folder is not None else None)
    results = simple_evaluate(
        model="hf",
        model_args=arguments,
        tasks=list(tasks),
        device=str(device),
        batch_size=8,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
    )
    return {} if results is None else {task: _metrics(results["results"][task]) for task in tasks}


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """`acc` and the like: the harness writes `acc,none`, with the name of a filter."""
    metrics = {}
    for name, value in result.items():
        metric, _, filter_name = name.partition(",")
        if filter_name and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            metrics[metric if filter_name == "none" else f"{metric} ({filter_name})"] = float(value)
    return metrics
