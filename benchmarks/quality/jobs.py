# SPDX-License-Identifier: Apache-2.0
"""The single measurements: of a base model, of the cost of a step, and of a fine-tuned model as it is deployed."""

from __future__ import annotations

import gc
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, set_seed

from peft_spp.durable import write_text

from ..harness import Contestant, Rounds, measure_interleaved
from ..harness.memory import storage_bytes, trace_memory
from .base_models import BaseModel, fingerprint, load_plain
from .data import UNLIKE
from .design import Checkpoint, Pruning
from .evaluation import exact_match, loss_per_token, sparsity_measures
from .harness_tasks import evaluate_tasks
from .methods import ADAPTER_FILE, METHODS, Method, remask, trainable_parameters
from .tuning import TuningSettings, train


TUNING_OPTIONS = ("B_rate_ratio", "weight_decay")
"""Options of a contender that are of its training, next to `"text"`, what is tuned on, and `"teacher"`, whether the
dense model's predictions are what is learned."""


def measure_base(base: BaseModel, pruning: Pruning | None) -> dict[str, Any]:
    """The measures of the model before fine-tuning, dense if there is no pruning."""
    source = base.source(pruning)
    model = base.load(pruning)
    with _work_folder(base, "base", pruning and pruning.name) as folder:
        measured = _kept(base, folder / "quality.json", partial(_quality, base, model))
        measured |= _kept(base, folder / "tasks.json", partial(_tasks, base, source))
    if pruning is not None:
        measured |= sparsity_measures(source, Path(source), pruning)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return measured | {"parameters": parameters}


def measure_steps(
    base: BaseModel, pruning: Pruning, contenders: Mapping[str, tuple[str, Mapping[str, Any]]]
) -> dict[str, Any]:
    """
    The cost of a training step of each contender, side by side: seconds in interleaved rounds, and memory.

    Args:
        base (`BaseModel`): The model.
        pruning (`Pruning`): How it is pruned.
        contenders (`Mapping[str, tuple[str, Mapping[str, Any]]]`): Methods and their options, by name.

    Returns:
        `dict[str, Any]`: By name `seconds` of each round, and `bytes`: adapter, gradients, state of the optimizer and
            the peak of the activations in the first step, above the pruned model.
    """
    ids = base.train_blocks[: base.budget.batch].to(base.accelerator.device)
    contestants: list[Contestant] = []
    measured: dict[str, Any] = {}
    for name, (method, options) in contenders.items():
        set_seed(0)
        own = base.load(pruning)
        pruned_bytes = storage_bytes(list(own.parameters()))
        dtype = _training_dtype(base, METHODS[method], options)
        adapted = METHODS[method].adapt(own if dtype == own.dtype else base.load(pruning, dtype), options).train()
        added = storage_bytes([*adapted.parameters(), *adapted.buffers()]) - pruned_bytes
        trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        autocast = dtype != own.dtype
        del own
        step = partial(_step, adapted, ids, torch.optim.AdamW(trained, fused=True), autocast)
        with _quiet():
            peak = trace_memory(step, base.accelerator.device).peak
        measured[name] = {"bytes": max(added, 0) + peak}
        contestants.append(Contestant(name, step))
    rounds = Rounds(exact=base.budget.timing_rounds, warmup=2)
    for name, seconds in measure_interleaved(contestants, base.accelerator.device, rounds).items():
        measured[name]["seconds"] = [round(value, 5) for value in seconds]
    return measured


def measure_tuned(
    base: BaseModel,
    pruning: Pruning,
    method: Method,
    options: Mapping[str, Any],
    *,
    rate: float,
    seed: int,
    steps: int,
    on_step: Callable[[int, float], object],
) -> dict[str, Any]:
    """
    Fine-tune a pruned model and measure what would be deployed.

    Each deployment is made from the saved adapter and the pruned model on disk, and measured once it is loaded again.

    Args:
        base (`BaseModel`): The model.
        pruning (`Pruning`): How it is pruned.
        method (`Method`): How it is fine-tuned.
        options (`Mapping[str, Any]`): What differs from the method's defaults.
        rate (`float`): The learning rate.
        seed (`int`): Of the factors and the order of the data.
        steps (`int`): Optimizer steps.
        on_step (`Callable[[int, float], object]`): Called with the number of steps done and the loss.

    Returns:
        `dict[str, Any]`: Of the run: `validation_loss`, `diverged`, `first_loss`, `last_loss`, `max_loss`, `tokens`,
            `seconds`, `cpu_seconds`, `trainable`, `adapter_bytes`, on CUDA `peak_bytes`; and `deployments`.
    """
    dtype = _dtype(options)

    def tune_and_save(folder: Path) -> dict[str, Any]:
        adapted, measured = _tune(base, pruning, method, options, rate, seed, steps, on_step)
        if not measured["diverged"]:
            if base.accelerator.is_main_process:
                method.save(adapted, folder / "adapter")
            base.accelerator.wait_for_everyone()
            measured["adapter_bytes"] = (folder / "adapter" / ADAPTER_FILE).stat().st_size
        return measured

    with _work_folder(base, pruning.name, method.name, dict(options), rate, seed, steps) as folder, _quiet():
        measured = _kept(base, folder / "training.json", partial(tune_and_save, folder))
        measured["deployments"] = {}
        gc.collect()
        for deployment in () if measured["diverged"] else method.deployments:
            measure = partial(_measure_deployment, base, pruning, method, deployment, folder, dtype)
            measured["deployments"][deployment] = _kept(base, folder / f"{deployment}.json", measure)
    return measured


def measure_rate(
    base: BaseModel,
    pruning: Pruning,
    method: Method,
    options: Mapping[str, Any],
    *,
    rate: float,
    seed: int,
    steps: int,
    on_step: Callable[[int, float], object],
) -> dict[str, Any]:
    """Fine-tune as [`measure_tuned`] does, with one sequence a step, and measure the loss on the validation text."""
    return _tune(base, pruning, method, options, rate, seed, steps, on_step, batch=1)[1]


def _tune(
    base: BaseModel,
    pruning: Pruning,
    method: Method,
    options: Mapping[str, Any],
    rate: float,
    seed: int,
    steps: int,
    on_step: Callable[[int, float], object],
    batch: int | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """A fine-tuned model, and what is to be said of its training."""
    accelerator, device = base.accelerator, base.accelerator.device
    set_seed(seed)
    dtype = _training_dtype(base, method, options)
    with _quiet():
        adapted = method.adapt(base.load(pruning, dtype), options)
    if isinstance(base.spec, Checkpoint) and device.type == "cuda":
        cast(PreTrainedModel, adapted).gradient_checkpointing_enable({"use_reentrant": False})
    settings = TuningSettings(
        rate,
        steps,
        batch or base.budget.batch,
        seed,
        micro_batch=base.budget.micro_batch,
        autocast=dtype != base.load_dtype(_dtype(options)),
        **{name: options[name] for name in TUNING_OPTIONS if name in options},
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    teacher = base.load(None).eval() if options.get("teacher") else None
    blocks = base.tuning_blocks(options.get("text", "data"))
    record = train(adapted, blocks, settings, accelerator, on_step, teacher)
    validation = math.inf if record.diverged else loss_per_token(adapted, base.validation_blocks, device)
    measured: dict[str, Any] = {
        "validation_loss": _finite(validation),
        "diverged": record.diverged,
        "first_loss": _finite(record.losses[0]),
        "last_loss": _finite(record.losses[-1]),
        "max_loss": _finite(max(record.losses)),
        "tokens": record.tokens,
        "seconds": round(record.seconds, 3),
        "cpu_seconds": round(record.cpu_seconds, 3),
        "trainable": trainable_parameters(adapted),
    }
    if device.type == "cuda":
        measured["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    return adapted, measured


def _dtype(options: Mapping[str, Any]) -> torch.dtype | None:
    return getattr(torch, options["dtype"]) if "dtype" in options else None


def _training_dtype(base: BaseModel, method: Method, options: Mapping[str, Any]) -> torch.dtype:
    """The dtype to load a model in that is to be trained; where it is not the model's, autocast computes in that."""
    if method.trains_weights and "dtype" not in options:
        return torch.float32
    return base.load_dtype(_dtype(options))


def _measure_deployment(
    base: BaseModel, pruning: Pruning, method: Method, deployment: str, folder: Path, dtype: torch.dtype | None
) -> dict[str, Any]:
    adapter = folder / "adapter"
    if deployment == "unmerged":
        model = method.load(base.load(pruning, dtype), adapter)
        return {**_quality(base, model), **_tasks(base, base.source(pruning), adapter)}
    saved = folder / deployment
    if base.accelerator.is_main_process:
        merged = method.merge(base.load(pruning, dtype), adapter)
        if deployment == "remasked":
            remask(merged, base.load(pruning, dtype))
        base.save(merged, saved)
        del merged
    base.accelerator.wait_for_everyone()
    model = load_plain(saved, base.accelerator.device, base.load_dtype(dtype))
    measured = {**_quality(base, model), **_tasks(base, str(saved))}
    return measured | sparsity_measures(base.source(pruning), saved, pruning)


def _quality(base: BaseModel, model: nn.Module) -> dict[str, Any]:
    device = base.accelerator.device
    if base.apart_blocks:
        losses = {name: loss_per_token(model, blocks, device) for name, blocks in base.apart_blocks.items()}
        like = [loss for name, loss in losses.items() if name != UNLIKE]
        measured: dict[str, Any] = {"test_loss": _finite(sum(like) / len(like))}
        measured["losses"] = {name: _finite(loss) for name, loss in losses.items()}
    else:
        measured = {"test_loss": _finite(loss_per_token(model, base.test_blocks, device))}
    problems = base.texts.problems[: base.budget.exact_match_problems]
    if problems:
        measured["exact_match"] = exact_match(model, base.tokenizer, problems, device)
    return measured


def _tasks(base: BaseModel, source: str, adapter: Path | None = None) -> dict[str, Any]:
    # of a checkpoint that is measured on part of its tasks, the merged LoRA says what the one not merged would
    if not base.budget.tasks or (adapter is not None and base.budget.task_limit is not None):
        return {}
    folder = None if base.budget.task_folder is None else Path(base.budget.task_folder)
    device = base.accelerator.device
    scores = evaluate_tasks(
        source,
        base.budget.tasks,
        device,
        adapter=adapter,
        task_folder=folder,
        limit=base.budget.task_limit,
        dtype=str(base.load_dtype()).removeprefix("torch."),
    )
    return {"tasks": scores}


def _step(model: nn.Module, ids: torch.Tensor, optimizer: torch.optim.Optimizer, autocast: bool) -> None:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=autocast):
        loss = cast(PreTrainedModel, model)(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _keeps(base: BaseModel) -> bool:
    """Whether parts of a measurement are kept until all of it is done: those of a checkpoint take long."""
    return isinstance(base.spec, Checkpoint) and base.accelerator.num_processes == 1


def _kept(base: BaseModel, file: Path, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A part of a measurement, from its file if a run before this one was stopped after it."""
    if file.is_file():
        return cast(dict[str, Any], json.loads(file.read_text(encoding="utf-8")))
    measured = measure()
    if _keeps(base):
        write_text(file, json.dumps(measured))
    return measured


@contextmanager
def _work_folder(base: BaseModel, *settings: Any) -> Iterator[Path]:
    """A folder for a measurement with these settings, which all processes see and which is removed once it is done."""
    if _keeps(base):
        kept = base.folder / "unfinished" / fingerprint(*settings)
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        shutil.rmtree(kept)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folders = [temporary]
        if base.accelerator.num_processes > 1:
            torch.distributed.broadcast_object_list(folders)
        yield Path(folders[0])
        base.accelerator.wait_for_everyone()


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # of models without a name on the Hub, and of the profiler
        warnings.filterwarnings("ignore", module=r"(peft|torch\.profiler)(\.|$)")
        yield
