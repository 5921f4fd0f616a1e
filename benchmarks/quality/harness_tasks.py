# SPDX-License-Identifier: Apache-2.0
"""Tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from peft_spp.durable import write_text
from peft_spp.installing import how_to_install

from .data import question_files, question_prompt


TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {file}
output_type: multiple_choice
test_split: train
doc_to_text: "{prompt}"
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""


def evaluate_tasks(
    source: str,
    tasks: Sequence[str],
    device: torch.device,
    *,
    adapter: Path | None = None,
    task_folder: Path | None = None,
    limit: int | None = None,
    dtype: str | None = None,
) -> dict[str, dict[str, Any]]:
    """
    Evaluate a saved model on tasks, zero-shot.

    Under `accelerate launch` every process has to call it; the harness divides the work among them.

    Args:
        source (`str`): The model's folder or repository on the Hub.
        tasks (`Sequence[str]`): The tasks by the harness' names.
        device (`torch.device`): The device.
        adapter (`Path`, *optional*): The folder of an adapter of PEFT that is used without merging it.
        task_folder (`Path`, *optional*): A folder with more tasks, as YAML files.
        limit (`int`, *optional*): Only the first examples of each task.
        dtype (`str`, *optional*): The dtype to compute in, by default that of the model.

    Returns:
        `dict[str, dict[str, Any]]`: By task the metrics that the harness gives, and for each that is 0 or 1 for every
            question which ones were right, as a string of digits by the name of the metric and `right`, and the
            `probability` of each question's right choice; empty on all processes but the first.

    Raises:
        ImportError: If lm-evaluation-harness is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"Tasks are evaluated by lm-evaluation-harness, which this installs: {how_to_install('quality')}"
        ) from error
    arguments: dict[str, Any] = {"pretrained": source, "dtype": dtype or "auto"}
    if adapter is not None:
        arguments["peft"] = str(adapter)
    own = all((task_folder / f"{task}.yaml").is_file() for task in tasks) if task_folder is not None else False
    manager = TaskManager(include_path=str(task_folder) if task_folder is not None else None, include_defaults=not own)
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
    if results is None:
        return {}
    return {task: _metrics(results["results"][task]) | _by_question(results["samples"][task]) for task in tasks}


def write_tasks(data: Path, folder: Path) -> tuple[str, ...]:
    """
    Tasks of the harness for the multiple-choice questions of a folder, with the prompts of its own tasks.

    Args:
        data (`Path`): Holds files named `*_test.jsonl`, of objects with `question`, `choices` and `answer`, an index.
        folder (`Path`): Where the tasks go, a YAML file each.

    Returns:
        `tuple[str, ...]`: Their names.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, file in question_files(data, "test").items():
        prompt = question_prompt(name, "{{question}}").replace("\n", "\\n")
        write_text(
            folder / f"{name}.yaml", TASK.format(name=name, file=json.dumps(str(file.resolve())), prompt=prompt)
        )
        names.append(name)
    return tuple(names)


def _by_question(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Which questions are right, and how probable the model takes each question's right choice for."""
    ordered = sorted(samples, key=lambda one: one["doc_id"])
    found: dict[str, Any] = {}
    for metric in ("acc", "acc_norm"):
        if ordered and all(one.get(metric) in (0, 1) for one in ordered):
            found[f"{metric} right"] = "".join(str(int(one[metric])) for one in ordered)
    if found:
        found["probability"] = [round(_probability(one), 4) for one in ordered]
    return found


def _probability(sample: Mapping[str, Any]) -> float:
    """The probability of the right choice among all, each taken to be of their mean length in characters."""
    lengths = [len(choice.lstrip()) for _, choice in sample["arguments"]]
    mean = sum(lengths) / len(lengths)
    scores = [
        float(score) * mean / length for (score, _), length in zip(sample["filtered_resps"], lengths, strict=True)
    ]
    return float(torch.tensor(scores).softmax(0)[int(sample["target"])])


def _metrics(result: dict[str, Any]) -> dict[str, float]:
    """`acc` and the like: the harness writes `acc,none`, with the name of a filter."""
    metrics = {}
    for name, value in result.items():
        metric, _, filter_name = name.partition(",")
        if filter_name and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            metrics[metric if filter_name == "none" else f"{metric} ({filter_name})"] = float(value)
    return metrics
