# SPDX-License-Identifier: Apache-2.0
"""Data to train on: local files and folders, and data sets of the Hub."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
from datasets.exceptions import DatasetsError  # type: ignore[import-untyped]
from transformers import TrainingArguments
from trl import DatasetMixtureConfig, ScriptArguments, get_dataset

from ..checkpoints.hub import looks_like_path
from ..error_text import one_line
from ..text_files import READ_ERRORS, builder_of, builder_options, find_fault, kinds, refuse_null
from .errors import InputError


_READ_ERRORS = (*READ_ERRORS, DatasetsError)
# what Dataset.save_to_disk and DatasetDict.save_to_disk leave
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")


def check_sources(script: ScriptArguments, mixture: DatasetMixtureConfig) -> None:
    """Check that local files and folders are there and of a kind that can be read, without reading them."""
    if script.dataset_name:
        _local_source(script.dataset_name)
    for config in mixture.datasets:
        if config.data_files is None:
            _local_source(config.path)


def load_data(
    script: ScriptArguments,
    mixture: DatasetMixtureConfig,
    training: TrainingArguments,
    columns: Sequence[tuple[str, ...]],
    needs: str,
) -> tuple[datasets.Dataset | datasets.IterableDataset, datasets.Dataset | datasets.IterableDataset | None]:
    """
    Load the data sets to train on and, if the run evaluates, to evaluate on.

    A source without a test split is split by `test_split_size`, if it is given.

    Its columns should be one of `columns`, the first of them that it has, or any if there are none; `needs` says so in
    words. It returns the data set to train on, and the one to evaluate on or `None`.
    """
    splits = _load(script, mixture)
    evaluates = training.eval_strategy != "no"
    train_name, test_name = script.dataset_train_split, script.dataset_test_split
    if evaluates and test_name not in splits and train_name in splits and mixture.test_split_size is not None:
        splits[train_name], splits[test_name] = _split(splits[train_name], mixture.test_split_size, training.seed)
    for name, option in ((train_name, "--dataset_train_split"), (test_name, "--dataset_test_split"))[: 1 + evaluates]:
        if name not in splits:
            hint = ", or --test_split_size to split one off" if option == "--dataset_test_split" else ""
            raise InputError(
                f"The data has no split {name!r}; it has {', '.join(map(repr, splits))}. Pass {option}{hint}."
            )
        try:
            _check_rows(splits[name], name, columns, needs)
        except InputError:
            raise
        except _READ_ERRORS as error:  # Arrow takes bytes that are not UTF-8, until they are read
            raise _unreadable(error, script, mixture) from error
    return splits[train_name], splits[test_name] if evaluates else None


def _load(script: ScriptArguments, mixture: DatasetMixtureConfig) -> dict[str, Any]:
    try:
        for file in _local_files(script, mixture):
            refuse_null(file)
        return _load_mixture(mixture) if mixture.datasets else _load_source(str(script.dataset_name), script)
    except InputError:
        raise
    except _READ_ERRORS as error:
        raise _unreadable(error, script, mixture) from error


def _unreadable(error: Exception, script: ScriptArguments, mixture: DatasetMixtureConfig) -> InputError:
    sources = _sources(script, mixture)
    faults = (find_fault(file) for file in _local_files(script, mixture))
    reason = next((fault for fault in faults if fault), None) or one_line(error)
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    place = Path(error.filename) if isinstance(error, OSError) and isinstance(error.filename, str) else None
    if "Not enough disk space" in reason or (
        place is not None and (place in cache.parents or cache in (place, *place.parents))
    ):
        reason += (
            f". The cache of `datasets` is {str(cache)!r}: set HF_DATASETS_CACHE to a folder that can be written to"
        )
    elif "corresponds to no data" in reason:
        reason = "it has no rows"
    return InputError(f"The dataset {', '.join(map(repr, sources))} cannot be loaded: {reason}")


def _sources(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[str]:
    return [str(script.dataset_name)] if script.dataset_name else _paths(mixture)


def _local_files(script: ScriptArguments, mixture: DatasetMixtureConfig) -> list[Path]:
    return [file for source in _sources(script, mixture) for file in _files(Path(source).expanduser())]


def _paths(mixture: DatasetMixtureConfig) -> list[str]:
    paths: list[str] = []
    for config in mixture.datasets:
        files = config.data_files or config.path
        if isinstance(files, dict):
            files = list(files.values())
        paths += [files] if isinstance(files, str) else files
    return paths


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())


def _split(dataset: Any, test_size: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    if not isinstance(dataset, datasets.Dataset):
        raise InputError(
            "Streamed data cannot be split by --test_split_size. Pass --dataset_test_split with the name of a split."
        )
    try:
        parts = dataset.train_test_split(test_size=test_size, seed=seed)
    except ValueError as error:
        raise InputError(f"--test_split_size is not valid: {one_line(error)}") from error
    return parts["train"], parts["test"]


def _load_source(name: str, script: ScriptArguments) -> dict[str, Any]:
    builder, path = _local_source(name)
    if builder == "disk":
        loaded = datasets.load_from_disk(str(path))
        return dict(loaded) if isinstance(loaded, datasets.DatasetDict) else {script.dataset_train_split: loaded}
    is_file = path is not None and path.is_file()
    files = {script.dataset_train_split: str(path)} if is_file else None
    options = builder_options(builder) if is_file else {}
    return dict(
        datasets.load_dataset(
            builder, name=script.dataset_config, data_files=files, streaming=script.dataset_streaming, **options
        )
    )


def _load_mixture(mixture: DatasetMixtureConfig) -> dict[str, Any]:
    configs = []
    for config in mixture.datasets:
        # files of its own go with the name of a kind: `path: json`
        builder, path = _local_source(config.path) if config.data_files is None else (config.path, None)
        if builder == "disk":
            raise InputError(
                f"{config.path!r} was written by save_to_disk, which a mixture does not support. Convert it to "
                "Parquet."
            )
        is_file = path is not None and path.is_file()
        configs.append(dataclasses.replace(config, path=builder, data_files=str(path)) if is_file else config)
    # split later, with a seed, so that all processes of a run get the same parts
    return dict(get_dataset(dataclasses.replace(mixture, datasets=configs, test_split_size=None)))


def _local_source(name: str) -> tuple[str, Path | None]:
    """What `load_dataset` is to be called with, or "disk", and the local file or folder, if it is one."""
    path = Path(name).expanduser()
    if path.is_file():
        builder = builder_of(path)
        if builder is None:
            raise InputError(f"The data file {name!r} has an unsupported format. It should be {kinds()}.")
        if path.stat().st_size == 0:
            raise InputError(f"The data file {name!r} is empty.")
        return builder, path
    if path.is_dir():
        if any((path / marker).is_file() for marker in _SAVED_TO_DISK):
            return "disk", path
        if not any(builder_of(file) for file in path.rglob("*")):
            raise InputError(f"The folder {name!r} has no data files. They should be {kinds()}.")
        return str(path), path
    if looks_like_path(name) or builder_of(path):
        raise InputError(f"The data file or folder {name!r} does not exist.")
    return name, None


def _check_rows(dataset: Any, split: str, columns: Sequence[tuple[str, ...]], needs: str) -> None:
    """Raise an [`InputError`] if there are no rows, or none of the columns that the trainer takes."""
    row = next(iter(dataset), None)
    if row is None:
        raise InputError(f"The split {split!r} of the data has no rows.")
    used = next((names for names in columns if row.keys() >= set(names)), () if not columns else None)
    if used is None:
        raise InputError(
            f"The split {split!r} of the data has the columns {', '.join(map(repr, row))}. Training needs {needs}."
        )
    for column in used:
        wanted = _type_of(column, row)
        # of streamed data, the first row is all that is there
        values = dataset[column] if isinstance(dataset, datasets.Dataset) else [row[column]]
        for number, value in enumerate(values, 1):
            # a label may be 0 or 1 too, as files without a type for it have it
            if wanted is not None and not (value in (0, 1) if wanted is bool else isinstance(value, wanted)):
                found = "null" if value is None else f"of type {type(value).__name__}"
                raise InputError(
                    f"Row {number} of the split {split!r} has a {column!r} that is {found}, and training needs "
                    f"{_IN_WORDS[wanted]}. Correct the row, or remove it."
                )
            if wanted is list and (lack := _lack_of(value, column)) is not None:
                raise InputError(
                    f"Row {number} of the split {split!r} has a {column!r} {lack}. Correct the row, or remove it."
                )


def _lack_of(messages: list[Any], column: str) -> str | None:
    """What a list of messages lacks. TRL takes the names of ShareGPT too, and renders what is missing as nothing."""
    if not messages:
        return "without messages"
    is_sharegpt = isinstance(messages[0], dict) and {"from", "value"} <= messages[0].keys()
    if column == "conversations" and not is_sharegpt:
        return "whose messages have no 'from' and 'value'; those with 'role' and 'content' go into a column 'messages'"
    role, content = ("from", "value") if is_sharegpt else ("role", "content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get(role), str):
            return f"whose message {number} has no {role!r}"
        if all(message.get(name) is None for name in (content, *_INSTEAD_OF_CONTENT)):
            return f"whose message {number} has no {content!r}"
    return None


_INSTEAD_OF_CONTENT = ("tool_calls", "function_call", "reasoning_content", "thinking")
_IN_WORDS = {list: "a list of messages", str: "text", bool: "true or false"}


def _type_of(column: str, row: dict[str, Any]) -> type | None:
    """The type of a column's values; `None` for tokens, which are not looked at."""
    if column.endswith("_ids"):
        return None
    if column == "label":
        return bool
    if column in ("messages", "conversations"):
        return list
    # text, or messages: all rows are what the first is
    either = column in ("prompt", "completion", "chosen", "rejected")
    return list if either and isinstance(row[column], list) else str
