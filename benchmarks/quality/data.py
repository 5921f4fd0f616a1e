# SPDX-License-Identifier: Apache-2.0
"""The texts: to train on, to choose learning rates by, and to measure on, with no paragraph in common."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import typer
from transformers import PreTrainedTokenizerBase

from peft_spp.demo.data import END_OF_TEXT, split_topics


HELD_OUT = 0.1
"""The share of the text that is held out for validation, and again for the test, where the text has no split."""

PART = 1000
"""The characters after which a file is divided, at the end of a paragraph, so that a part of it can be held out."""

UNLIKE = "unlike"
"""The name of the text that is like none that is trained on."""

TEXT_FILES = (".txt", ".md", ".rst")


@dataclass(frozen=True)
class Problem:
    """A problem of GSM8K.

    Args:
        question (`str`): The question.
        answer (`str`): The steps, and the result after `####`.
    """

    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """What a model is given."""
        return f"Question: {self.question}\nAnswer:"

    @property
    def text(self) -> str:
        """What a model is trained on."""
        return f"{self.prompt} {self.answer}"


@dataclass(frozen=True)
class Texts:
    """Texts by what they are for.

    Args:
        train (`tuple[str, ...]`): To train on.
        validation (`tuple[str, ...]`): To choose learning rates by.
        test (`tuple[str, ...]`): To measure on.
        problems (`tuple[Problem, ...]`): The problems among those of the test.
        source (`str`): Where they are from, for readers.
        apart (`Mapping[str, tuple[str, ...]]`): Texts to measure on one by one: the test texts by their file, and
            Python's documentation, which no folder's text is like.
        questions (`tuple[str, ...]`): The training parts of the tasks, each question with its right answer.
        questions_id (`str`): Tells the questions of the tasks, of both parts, from others.
    """

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]
    problems: tuple[Problem, ...]
    source: str
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    questions: tuple[str, ...] = ()
    questions_id: str = ""

    @property
    def fingerprint(self) -> str:
        """Tells these texts from others."""
        content = json.dumps([self.train, self.validation, self.test])
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def load_texts(folder: Path | None, seed: int) -> Texts:
    """
    Read the texts of a folder, or those that every CPython has.

    Of GSM8K, `gsm8k_train.jsonl` is trained on and the problems of `gsm8k_test.jsonl` are halved between validation
    and test. All other text files are split by documents: articles of WikiText, some paragraphs of other files.

    Args:
        folder (`Path`, *optional*): The folder; without it the topics of Python's `help()` are taken.
        seed (`int`): The seed of the splits.

    Raises:
        typer.BadParameter: If the folder has no texts.
    """
    if folder is None:
        return _split_documents(topics, seed, "the documentation that CPython ships (pydoc_data.topics)")
    documents, names = {}, []
    for file in sorted(path for path in folder.rglob("*") if path.suffix in TEXT_FILES and path.is_file()):
        if not file.stem.lower().startswith("readme"):
            documents.update(_documents(file))
            names.append(file.name)
    problems = {part: _read_problems(folder / f"gsm8k_{part}.jsonl") for part in ("train", "test")}
    if not documents and not problems["train"]:
        raise typer.BadParameter(
            f"{folder} has no *.txt, *.md or *.rst files and no gsm8k_train.jsonl.", param_hint="--data"
        )
    texts = _split_documents(documents, seed, "") if documents else Texts((), (), (), (), "")
    held_out = problems["test"]
    random.Random(seed).shuffle(held_out)
    middle = len(held_out) // 2
    names += ["gsm8k_train.jsonl", "gsm8k_test.jsonl"] if problems["train"] else []
    apart = {"text": texts.test, "problems": tuple(problem.text for problem in held_out[middle:])}
    return Texts(
        texts.train + tuple(problem.text for problem in problems["train"]),
        texts.validation + tuple(problem.text for problem in held_out[:middle]),
        texts.test + tuple(problem.text for problem in held_out[middle:]),
        tuple(held_out[middle:]),
        ", ".join(names),
        {name: some for name, some in apart.items() if some} | {UNLIKE: tuple(topics.values())},
        tuple(_read_questions(folder)),
        _questions_id(folder),
    )


def question_prompt(task: str, question: str) -> str:
    """What a model is given of a question with choices, as lm-evaluation-harness' own tasks do."""
    return question if task == "openbookqa" else f"Question: {question}\nAnswer:"


def blocks_of(tokenizer: PreTrainedTokenizerBase, texts: tuple[str, ...], size: int, seed: int) -> list[list[int]]:
    """
    Cut texts to blocks of tokens, in a random order.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        texts (`tuple[str, ...]`): The texts; each is closed by the end-of-text token.
        size (`int`): The tokens in a block.
        seed (`int`): The seed of the order, in which the texts are joined too.

    Returns:
        `list[list[int]]`: The blocks, without the rest that fills none.
    """
    shuffler = random.Random(seed)
    end = tokenizer.eos_token or END_OF_TEXT
    joined = "".join(text + end for text in shuffler.sample(texts, len(texts)))
    ids = tokenizer(joined, add_special_tokens=False)["input_ids"]
    blocks = [ids[start : start + size] for start in range(0, len(ids) - size + 1, size)]
    shuffler.shuffle(blocks)
    return blocks


def _split_documents(documents: dict[str, str], seed: int, source: str) -> Texts:
    rest, test = split_topics(documents, HELD_OUT, seed)
    train, validation = split_topics({str(n): text for n, text in enumerate(rest)}, HELD_OUT, seed)
    return Texts(tuple(train), tuple(validation), tuple(test), (), source)


def _documents(file: Path) -> dict[str, str]:
    """The articles of a file of WikiText, each after a title between single `=`; of other files, parts of the text."""
    text = file.read_text(encoding="utf-8", errors="replace")
    articles = re.split(r"(?m)^(?= = [^=\n]+ = *$)", text)
    parts = articles if len(articles) > 1 else _parts(text)
    return {f"{file.name} {number}": part.strip() for number, part in enumerate(parts) if part.strip()}


def _parts(text: str) -> list[str]:
    """Whole paragraphs, joined to parts of at least [`PART`] characters."""
    parts = [""]
    for paragraph in text.split("\n\n"):
        if len(parts[-1]) >= PART:
            parts.append("")
        parts[-1] += paragraph + "\n\n"
    return parts


def _read_problems(file: Path) -> list[Problem]:
    if not file.is_file():
        return []
    rows = _read_rows(file)
    # the answers have the calculations once more between << and >>, for a calculator
    return [Problem(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in rows]


def question_files(folder: Path, part: str) -> dict[str, Path]:
    """The files named `*_{part}.jsonl` whose questions have choices, by the name of the task."""
    files = {file.stem.removesuffix(f"_{part}"): file for file in sorted(folder.glob(f"*_{part}.jsonl"))}
    return {task: file for task, file in files.items() if any("choices" in row for row in _read_rows(file)[:1])}


def _read_questions(folder: Path) -> list[str]:
    """The questions of the tasks' training parts, with their right answers."""
    return [
        f"{question_prompt(task, row['question'])} {row['choices'][row['answer']]}"
        for task, file in question_files(folder, "train").items()
        for row in _read_rows(file)
    ]


def _questions_id(folder: Path) -> str:
    """Tells the questions with choices of a folder from others."""
    files = {part: question_files(folder, part) for part in ("train", "test")}
    content = {part: {task: _read_rows(file) for task, file in some.items()} for part, some in files.items()}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12] if any(content.values()) else ""


def _read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line]
