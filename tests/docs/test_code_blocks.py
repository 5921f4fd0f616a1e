# SPDX-License-Identifier: Apache-2.0
"""The code in README and on the pages runs, or is checked as far as it goes here."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import trl
from datasets import Dataset

from helpers.code_blocks import LANGUAGES, PAGES, check_python, command_lines, languages
from helpers.page_commands import check_command


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TUTORIAL = ROOT / "docs" / "tutorial.md"
WITH_CODE = [page for page in DOCUMENTS if page != TUTORIAL and {"python", "bash"} & set(languages(page))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass
class ShortSFT(trl.SFTConfig):
    use_cpu: bool = True
    max_steps: int = 2
    report_to: str = "none"


@dataclass
class ShortDPO(trl.DPOConfig):
    use_cpu: bool = True
    max_steps: int = 2
    report_to: str = "none"


@pytest.fixture(autouse=True)
def short_training_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages train for as long as a reader would, on the reader's GPU."""
    for short in (ShortSFT, ShortDPO):
        monkeypatch.setattr(trl, short.__base__.__name__, short)


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_works(page: Path, folder_of_models: Path) -> None:
    document = PAGES.parse(page)
    lines = (folder_of_models / "texts.jsonl").read_text().splitlines()
    document.namespace["dataset"] = Dataset.from_list([json.loads(line) for line in lines[:16]])
    for example in document.examples():
        example.evaluate()


@pytest.mark.slow
def test_the_tutorial_works_prints_what_it_shows_and_wins_back_what_pruning_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    document = PAGES.parse(TUTORIAL)
    for example in document.examples():
        example.evaluate()
    right = {
        folder: int(re.findall(r"\d+", document.namespace["right_sums"](folder))[2])
        for folder in ("dense", "pruned", "merged")
    }
    assert right["pruned"] < right["dense"] / 2 and right["merged"] > 2 * right["pruned"]


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_every_block_is_in_a_language_that_is_tested_or_needs_no_test(page: Path) -> None:
    assert set(languages(page)) <= LANGUAGES


@pytest.mark.parametrize(
    "source",
    [
        "from peft_spp import SPPConfig\nSPPConfig(rank=8)",
        "from peft_spp import SPPConfigs",
        "import peft_spp.merging",
        "from peft_spp.merge import merge_checkpoint\nmerge_checkpoint('a', 'b', out='c')",
        "import peft_spp\npeft_spp.push_to_the_hub(model)",
        "SPPConfig(",
    ],
)
def test_a_wrong_block_that_does_not_run_is_found(source: str) -> None:
    with pytest.raises((AssertionError, AttributeError, ImportError, SyntaxError)):
        check_python(source, {})


@pytest.mark.parametrize(
    "command",
    [
        "peft-spp merges my-adapter my-model",
        "peft-spp merge my-adapter",
        "peft-spp merge my-adapter my-model --owerwrite",
        "peft-spp prune a b --method wander",
        "peft-spp sft --model_name_or_path a --dataset_name b --spp_rank 16",
        'pip install ".[trains]"',
        "python tests/no_such_file.py",
        "accelerate launch --config_file benchmarks/configs/none.yaml train.py",
        "peftspp merge a b",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    (words,) = command_lines(command)
    with pytest.raises((Exception, SystemExit)):
        check_command(words)


def test_the_files_that_contributors_are_sent_to_exist() -> None:
    page = (ROOT / "docs" / "contributing.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:peft_spp|tests|benchmarks|docs)/[\w/.]*)`", page)
    assert len(named) > 20
    assert not [path for path in named if not (ROOT / path).exists()]
