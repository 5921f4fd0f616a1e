# SPDX-License-Identifier: Apache-2.0
"""The data of `peft-spp sft`: where it is read from, and what of it is trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict, Features, LargeList, List, Value

from peft_spp.sft.run import main

from helpers.sft_cases import ROWS, refusal, write_jsonl
from helpers.trl_cases import (
    SMALL,
)


@pytest.mark.parametrize(
    "kind", ["json", "jsonl", "jsonl.gz", "parquet", "csv", "folder", "split folder", "saved", "streamed", "mixture"]
)
def test_reads_local_files_and_folders(
    kind: str, base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset, extra = Dataset.from_list(ROWS), []
    path = tmp_path / f"texts.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    elif kind.startswith("jsonl"):
        dataset.to_json(path, compression="gzip" if kind.endswith("gz") else None)
    elif kind == "parquet":
        dataset.to_parquet(path)
    elif kind == "csv":
        dataset.to_csv(path)
    elif kind == "folder":
        dataset.to_parquet(path / "part.parquet")
        extra = ["--eval_strategy", "epoch", "--test_split_size", "0.2"]
    elif kind == "split folder":
        write_jsonl(path / "train.jsonl")
        write_jsonl(path / "test.jsonl", ROWS[:4])
        extra = ["--eval_strategy", "epoch"]
    elif kind == "saved":
        DatasetDict({"train": dataset, "test": dataset.select(range(3))}).save_to_disk(path)
        extra = ["--eval_strategy", "epoch"]
    elif kind == "streamed":
        dataset.to_json(path.with_suffix(".jsonl"))
        path, extra = path.with_suffix(".jsonl"), ["--dataset_streaming", "--max_steps", "2"]
    if kind == "mixture":
        files = [write_jsonl(tmp_path / "a.jsonl"), write_jsonl(tmp_path / "b.jsonl", ROWS[:5])]
        path = tmp_path / "config.yaml"
        path.write_text(
            yaml.safe_dump({"datasets": [{"path": str(files[0])}, {"path": "json", "data_files": str(files[1])}]})
        )
        source = ["--config", str(path)]
    else:
        source = ["--dataset_name", str(path)]
    out = tmp_path / "out"
    main(["--model_name_or_path", base, *source, *SMALL, "--output_dir", str(out), "--dry_run", *extra])
    rows = {"folder": 16, "mixture": 25, "streamed": "streamed"}.get(kind, 20)
    assert f"{rows} rows" in capsys.readouterr().err
    assert not out.exists()


def test_rows_that_are_left_out_are_counted(base: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """TRL silently drops rows whose prompt fills the length."""
    rows = [{"prompt": "a", "completion": "b c"}, {"prompt": "half of the rows are number 1", "completion": "b"}]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    arguments = ["--model_name_or_path", base, "--dataset_name", str(data), *SMALL, "--output_dir", "out"]
    main([*arguments, "--max_length", "5", "--dry_run"])
    assert "Warning: 1 of 2 rows to train on are left out" in capsys.readouterr().err
    main([*arguments, "--dry_run"])
    assert "left out" not in capsys.readouterr().err


def test_labels_may_be_of_another_type_of_list(base: str, tmp_path: Path) -> None:
    """As in Parquet files of other libraries."""
    features = Features({"input_ids": List(Value("int64")), "labels": LargeList(Value("int64"))})
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}], features=features)
    rows.to_parquet(str(tmp_path / "data.parquet"))
    arguments = ["--model_name_or_path", base, "--dataset_name", str(tmp_path / "data.parquet"), *SMALL]
    main([*arguments, "--output_dir", "out", "--dry_run"])


def test_calls_of_tools_need_no_content(base: str, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text("{% for one in messages %}<{{ one.role }}>{{ one.content }}{% endfor %}")
    calls = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    data = write_jsonl(tmp_path / "data.jsonl", [{"messages": messages}])
    arguments = ["--model_name_or_path", base, "--dataset_name", str(data), *SMALL, "--output_dir", "out"]
    main([*arguments, "--chat_template_path", str(tmp_path / "chat.jinja"), "--dry_run"])


def test_a_cache_that_cannot_be_written_to_is_named(
    base: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "home" / "datasets"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)

    def fails(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(tmp_path / "home"))

    monkeypatch.setattr("datasets.load_dataset", fails)
    shown = refusal("--model_name_or_path", base, "--dataset_name", data, *SMALL, "--output_dir", "out")
    assert f"The cache of `datasets` is {str(cache)!r}: set HF_DATASETS_CACHE" in shown
