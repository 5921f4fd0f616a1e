# SPDX-License-Identifier: Apache-2.0
"""The questions of the quality benchmark, as tasks of lm-evaluation-harness."""

import json
import math

import pytest


pytest.importorskip("datasets")

from benchmarks.quality.data import load_texts
from benchmarks.quality.harness_tasks import _probability, write_tasks
from benchmarks.quality.store import Store


def test_the_probability_of_a_choice_does_not_depend_on_its_length():
    sample = {"target": 1, "arguments": [("Q", " abcd"), ("Q", " ab")]}
    # each 1 for a character, then twice as much for the right one
    assert _probability({**sample, "filtered_resps": [(-4.0, False), (-2.0, False)]}) == pytest.approx(0.5)
    expected = math.exp(-3) / (math.exp(-3) + math.exp(-6))
    assert _probability({**sample, "filtered_resps": [(-8.0, False), (-2.0, False)]}) == pytest.approx(expected)


def test_questions_are_written_as_the_tasks_ask_them(tmp_path):
    row = {"question": "Why?", "choices": ["a", "b"], "answer": 1}
    for name in ("arc_easy", "openbookqa"):
        for part in ("train", "test"):
            (tmp_path / f"{name}_{part}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n}. {'word ' * 300}" for n in range(30)))
    assert load_texts(tmp_path, seed=0).questions == ("Question: Why?\nAnswer: b", "Why? b")
    write_tasks(tmp_path, tmp_path / "tasks")
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in (tmp_path / "tasks" / "arc_easy.yaml").read_text()
    assert 'doc_to_text: "{{question}}"' in (tmp_path / "tasks" / "openbookqa.yaml").read_text()


def test_results_are_of_one_set_of_questions(tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(f"Paragraph {n}. {'word ' * 300}" for n in range(30)))
    found = []
    for part, answer in (("train", 0), ("train", 1), ("test", 1)):
        row = {"question": "Why?", "choices": ["a", "b"], "answer": answer}
        (tmp_path / f"arc_easy_{part}.jsonl").write_text(json.dumps(row) + "\n")
        found.append(load_texts(tmp_path, seed=0).questions_id)
    assert len(set(found)) == 3
    own, other = (Store("pretrained", tmp_path / f"{name}.json") for name in ("own", "other"))
    own.begin({}, {"questions": found[0]})
    own.begin({}, {"questions": found[0]})
    other.begin({}, {"questions": found[1]})
    with pytest.raises(ValueError, match=r"This run asks other questions than .*own\.json has answers to"):
        own.begin({}, {"questions": found[1]})
    with pytest.raises(ValueError, match=r"other\.json asks other questions"):
        own.take(other)


def test_tasks_are_made_of_the_files_with_choices_alone(tmp_path):
    (tmp_path / "gsm8k_test.jsonl").write_text('{"question": "How many?", "answer": "#### 2"}\n')
    (tmp_path / "arc_easy_test.jsonl").write_text('{"question": "Why?", "choices": ["a", "b"], "answer": 1}\n')
    assert write_tasks(tmp_path, tmp_path / "tasks") == ("arc_easy",)
    task = (tmp_path / "tasks" / "arc_easy.yaml").read_text()
    assert 'doc_to_text: "Question: {{question}}\\nAnswer:"' in task
