# SPDX-License-Identifier: Apache-2.0
"""The command line: `python -m benchmarks.quality`, or with many devices `accelerate launch -m benchmarks.quality`."""

from __future__ import annotations

import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from accelerate import Accelerator

from peft_spp.demo.display import make_progress, quiet_libraries

from ..harness import describe_environment, make_console
from ..harness import options as opt
from .base_models import BaseModel
from .data import load_texts
from .design import Checkpoint, Contender, Study, Suite, TuningBudget
from .estimate import needs_on_gpu
from .harness_tasks import write_tasks
from .page import write_report
from .plan import Session, describe
from .pretrained.page import write_pretrained
from .pretrained.suite import PRETRAINED
from .store import Store
from .suites import QUICK, SUITES


PAGES = {"small": Path("docs/quality.md"), "pretrained": Path("docs/pretrained.md")}
WORK = Path("~/.cache/peft_spp/quality")

ALL_SUITES = {**SUITES, PRETRAINED.name: PRETRAINED}

app = typer.Typer(add_completion=False)


@app.command()
def main(
    suite: Annotated[str, typer.Option(help=f"What to measure: {', '.join(ALL_SUITES)}.")] = "small",
    data: Annotated[
        Path | None,
        typer.Option(
            help="A folder with gsm8k_train.jsonl and gsm8k_test.jsonl, text files (*.txt, *.md, *.rst) or both; by "
            "default Python's documentation. The suite pretrained takes its tasks from there too: *_test.jsonl and "
            "*_train.jsonl, of objects with a question, choices and the index of the answer.",
            exists=True,
            file_okay=False,
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Of the suite llama only these checkpoints, by name or folder. Of the suite pretrained the folder of "
            "a dense model. May be repeated."
        ),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="Only these methods of the suite, such as masked_full. May be repeated."),
    ] = None,
    pruning: Annotated[
        list[str] | None,
        typer.Option(help="Only these prunings of the suite, such as wanda-0.5. May be repeated."),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-evaluation-harness instead of those of the suite llama. May be repeated."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="A folder with tasks of your own, as YAML files.", exists=True, file_okay=False)
    ] = None,
    steps_only: Annotated[
        bool,
        typer.Option("--steps-only", help="Only the costs of training steps. Run it on an idle machine."),
    ] = False,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps of each fine-tuning, instead of the suite's.")
    ] = None,
    device: opt.DeviceOption = opt.Device.cpu,
    threads: opt.ThreadsOption = None,
    machine: opt.MachineOption = None,
    output_dir: opt.OutputOption = opt.DEFAULT_OUTPUT,
    work_dir: Annotated[Path, typer.Option(help="Where models are kept between runs.")] = WORK,
    page: Annotated[
        Path | None,
        typer.Option(
            help="The page to write; by default docs/quality.md or, of the suite pretrained, docs/pretrained.md; next "
            "to the JSON of a quick run."
        ),
    ] = None,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Only write the page of what is measured.")
    ] = False,
    add: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --report-only: merge result files of other processes or machines into this one. May be "
            "repeated.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    plan_only: Annotated[
        bool, typer.Option("--plan", help="Only list what would be measured, and what checkpoints take on a GPU.")
    ] = False,
    quick: opt.QuickOption = False,
) -> None:
    """Fine-tune pruned models by SPP and its competitors, and measure what is won back. What is done is kept."""
    if suite not in ALL_SUITES:
        raise typer.BadParameter(f"{suite!r} is not one of: {', '.join(ALL_SUITES)}.", param_hint="--suite")
    chosen = QUICK if quick else choose_models(ALL_SUITES[suite], model or [])
    if chosen.models == PRETRAINED.models and not (plan_only or report_only):
        raise typer.BadParameter("The suite pretrained needs the folder of a dense model.", param_hint="--model")
    if chosen.name == PRETRAINED.name and data is None and not (plan_only or report_only):
        raise typer.BadParameter("The suite pretrained needs texts to tune on, and questions.", param_hint="--data")
    if add and not report_only:
        raise typer.BadParameter("--add needs --report-only.", param_hint="--add")
    chosen = replace(chosen, budget=change_budget(chosen.budget, steps, task, task_folder))
    narrowed = narrow(chosen, method or [], pruning or [], steps_only)
    console = make_console()
    if plan_only:
        for line in (*describe(narrowed), *needs_on_gpu(narrowed)):
            console.print(line, markup=False)
        return
    run = opt.start_run(f"quality-{suite}", device, machine, output_dir, threads, quick)
    store = open_store(run.json_path, chosen.name, "--output-dir")
    accelerator = Accelerator(cpu=run.device.type == "cpu")
    if add:
        for file in add:
            try:
                store.take(open_store(file, chosen.name, "--add"))
            except ValueError as error:
                raise typer.BadParameter(str(error), param_hint="--add") from error
        store.about |= {"suite": described(chosen)} if model else {}
        store.save()
    if not report_only:
        texts = load_texts(data, seed=0)
        told = any(one.options.get("text") == "questions" for study in narrowed.studies for one in study.contenders)
        if told and not texts.questions:
            raise typer.BadParameter(f"{data} has no *_train.jsonl of questions with choices.", param_hint="--data")
        about = {"text": texts.source, "suite": described(chosen), "questions": texts.questions_id}
        try:
            store.begin(describe_run(run.device), about)
        except ValueError as error:
            raise typer.BadParameter(str(error), param_hint="--data") from error
        # what is left out is described all the same: the page tells what is missing
        every_study = chosen.studies
        chosen = replace(chosen, studies=narrowed.studies)
        folder = work_dir.expanduser()
        if suite == PRETRAINED.name and data is not None and not (quick or task):
            tasks = write_tasks(data, folder / "tasks")
            chosen = replace(chosen, budget=change_budget(chosen.budget, None, list(tasks), folder / "tasks"))
        bases = {spec.name: BaseModel(spec, texts, chosen.budget, folder, accelerator) for spec in chosen.models}
        with quiet_libraries(), make_progress(console) as progress:
            progress.disable = progress.disable or not accelerator.is_main_process
            Session(chosen, bases, store, progress, whole=narrowed.studies == every_study).run()
    if accelerator.is_main_process:
        target = page or (run.json_path.with_suffix(".md") if quick else PAGES.get(suite, PAGES["small"]))
        pretrained = suite == PRETRAINED.name and not quick
        written = write_pretrained(store, target) if pretrained else write_report(run.json_path.parent, target, quick)
        for path in written:
            console.print(f"Written: {path}", markup=False)


def open_store(path: Path, suite: str, option: str) -> Store:
    """
    The store of a file.

    Raises:
        typer.BadParameter: If the file holds something else.
    """
    try:
        return Store.open(path, suite)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error


def choose_models(suite: Suite, names: list[str]) -> Suite:
    """
    A suite of checkpoints with only some of them. A folder stands for a checkpoint that the suite does not know; it is
    studied as the first one is.

    Raises:
        typer.BadParameter: If the suite trains its own models, or a name is neither known nor a folder.
    """
    if not names:
        return suite
    if not all(isinstance(model, Checkpoint) for model in suite.models):
        raise typer.BadParameter(f"The suite {suite.name} trains its own models.", param_hint="--model")
    first = suite.models[0]
    assert isinstance(first, Checkpoint)
    known = {model.name: model for model in suite.models if isinstance(model, Checkpoint) and model.source}
    models, studies = [], []
    for name in names:
        if name not in known and not Path(name).is_dir():
            raise typer.BadParameter(
                f"{name!r} is no folder and not one of: {', '.join(known)}.", param_hint="--model"
            )
        model = known.get(name) or replace(first, name=Path(name).resolve().name, source=name)
        studied = model.name if name in known else suite.models[0].name
        models.append(model)
        studies += [replace(study, model=model.name) for study in suite.studies if study.model == studied]
    return replace(suite, models=tuple(models), studies=tuple(studies))


def narrow(suite: Suite, methods: list[str], prunings: list[str], steps_only: bool = False) -> Suite:
    """
    A suite with only some of its methods and of its prunings, all where none is named. The costs of the steps are
    ratios to those of other methods, so that their study is whole or left out.

    Raises:
        typer.BadParameter: If the suite does not have one of them, or nothing is left.
    """
    known = {
        "--method": ({one.method for study in suite.studies for one in study.contenders}, methods),
        "--pruning": ({study.pruning.name for study in suite.studies}, prunings),
    }
    for option, (names, wanted) in known.items():
        if unknown := set(wanted) - names:
            raise typer.BadParameter(
                f"{', '.join(sorted(unknown))} is not one of: {', '.join(sorted(names))}.", param_hint=option
            )
    if steps_only:
        studies = [study for study in suite.studies if study.steps_only]
    else:
        studies = [
            replace(study, contenders=_of_methods(study, methods))
            for study in suite.studies
            if (not prunings or study.pruning.name in prunings) and not (study.steps_only and (methods or prunings))
        ]
    studies = [study for study in studies if study.contenders]
    if not studies:
        raise typer.BadParameter("The suite has no such study.", param_hint="--method, --pruning, --steps-only")
    return replace(suite, studies=tuple(studies))


def _of_methods(study: Study, methods: list[str]) -> tuple[Contender, ...]:
    return tuple(one for one in study.contenders if not methods or one.method in methods)


def described(suite: Suite) -> dict[str, Any]:
    """A suite as data, without the folders of this machine."""
    content = asdict(suite)
    content["budget"].pop("task_folder")
    for model in content["models"]:
        if "source" in model and Path(model["source"]).is_dir():
            model["source"] = Path(model["source"]).name
    return content


def describe_run(device: torch.device) -> dict[str, Any]:
    """Where a run is made, with `FOLDER` in the place of the folders of this machine in its command."""
    environment = describe_environment(device)
    words = shlex.split(environment["command"])
    words = ["FOLDER" if word.startswith(("/", "~")) else word for word in words]
    return {**environment, "command": shlex.join(words)}


def change_budget(
    budget: TuningBudget, steps: int | None, tasks: list[str] | None, task_folder: Path | None
) -> TuningBudget:
    """The budget of a suite with what was asked for on the command line."""
    return replace(
        budget,
        steps=steps or budget.steps,
        tasks=tuple(tasks) if tasks else budget.tasks,
        task_folder=str(task_folder) if task_folder else None,
    )


if __name__ == "__main__":
    torch.set_num_interop_threads(1)
    app()
