# SPDX-License-Identifier: Apache-2.0
"""Files of texts, as calibration and `sft` read them."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_spp.installing import how_to_install
from peft_spp.text_files import builder_of, find_fault, read_texts


def lines(*texts: str, end: str = "\n") -> bytes:
    """JSON lines with every character as it is, where JSON allows that."""
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + end for text in texts).encode()


TEXTS = ["a\u2028b", "c\u2029d\u0085e", "f\x0b\x0c\x1c\x1d\x1eg", "é 模 😀"]
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("texts.jsonl", lines(*TEXTS)),
        ("texts.JSONL", lines(*TEXTS)),
        ("texts.ndjson", lines(*TEXTS)),
        ("texts.json", lines(*TEXTS)),
        ("bom.jsonl", BOM + lines(*TEXTS)),
        ("crlf.jsonl", lines(*TEXTS, end="\r\n")),
        ("blank.jsonl", b"\n \t\n" + lines(*TEXTS, end="\n\n   \n") + b"\n"),
        ("no-newline.jsonl", lines(*TEXTS).rstrip()),
        ("escaped.jsonl", "\n".join(json.dumps({"id": 1, "text": text}) for text in TEXTS).encode()),
        ("array.json", json.dumps([{"text": text} for text in TEXTS], indent=2).encode()),
        ("array-bom.json", BOM + json.dumps([{"text": text} for text in TEXTS], ensure_ascii=False).encode()),
        ("strings.json", json.dumps(TEXTS).encode()),
        ("texts.jsonl.gz", gzip.compress(lines(*TEXTS), mtime=0)),
        ("texts.jsonl.bz2", bz2.compress(lines(*TEXTS))),
        ("texts.JSONL.XZ", lzma.compress(lines(*TEXTS))),
    ],
)
def test_texts_are_read_as_they_were_written(name: str, content: bytes, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    assert read_texts(tmp_path / name) == TEXTS


@settings(max_examples=15, deadline=None)
@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=5), escaped=st.booleans()
)
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str], escaped: bool) -> None:
    # a column of which every text is a date is read as dates
    texts = [f"t{text}" for text in texts]
    rows = [json.dumps({"text": text}, ensure_ascii=escaped) for text in texts]
    file = tmp_path_factory.mktemp("any") / "texts.jsonl"
    file.write_bytes("\n".join(rows).encode())
    assert read_texts(file) == texts


def test_tables_are_read_too(tmp_path: Path) -> None:
    Dataset.from_dict({"text": TEXTS, "id": [1, 2, 3, 4]}).to_parquet(tmp_path / "texts.parquet")
    assert read_texts(tmp_path / "texts.parquet") == TEXTS
    (tmp_path / "texts.csv").write_bytes(BOM + b'text,id\n"a\nb",1\nc,2\n')
    assert read_texts(tmp_path / "texts.csv") == ["a\nb", "c"]


@pytest.mark.parametrize("name", ["notes.txt", "notes.md", "notes", "notes.txt.gz", "notes.jsonl.md"])
def test_plain_text_is_one_document_and_needs_no_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    content = BOM + "one\r\n\n two\u2028".encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    assert read_texts(tmp_path / name) == ["one\r\n\n two\u2028"]


def test_json_without_the_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "texts.jsonl").write_bytes(lines("a"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=re.escape(how_to_install("train"))):
        read_texts(tmp_path / "texts.jsonl")


GOOD = lines("good", "also good") + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", GOOD + b'{"text": "half \\ud83d"}\n', "line 4 .* surrogate"),
        ("a.jsonl", GOOD + b'{"text": "half \xed\xa0\xbd"}\n', "line 4 .* not text in UTF-8"),
        ("a.jsonl", GOOD + b'{"text": "caf\xe9"}\n' + GOOD, "line 4 .* not text in UTF-8"),
        ("a.jsonl", GOOD + b'{"text": \n' + GOOD, "line 4 .* not valid JSON"),
        ("a.jsonl", GOOD + b'"bare"\n', "line 4 .* not a JSON object"),
        ("a.jsonl", b"\xef\xbb\xbfnull\nnull null\n", "line 1 .* not a JSON object"),
        ("a.jsonl", GOOD + b"null\n", "line 4 .* not a JSON object"),
        ("a.jsonl", GOOD + b'{"text": "a", "text": "b"}\n', "line 4 .* duplicate key 'text'"),
        ("a.jsonl", GOOD + b'{"text": 5}\n', "line 4 .* no 'text' that is a string"),
        ("a.jsonl", GOOD + b'{"text": null}\n', "line 4 .* no 'text'"),
        ("a.jsonl", GOOD + b'{"body": "b"}\n', "line 4 .* no 'text'"),
        ("a.jsonl", b'{"body": "b"}\n', "has no column 'text'; its columns are 'body'"),
        ("a.jsonl", lines("a").decode().encode("utf-16"), "not text in UTF-8"),
        ("a.jsonl.gz", gzip.compress(GOOD + b'{"text": \n', mtime=0), "line 4 .* not valid JSON"),
        ("a.jsonl.gz", gzip.compress(GOOD, mtime=0)[:-9], "damaged"),
        ("a.jsonl.gz", GOOD, "damaged"),
        ("a.json", b'[{"text": "a"},\n{"text": }]', "line 2"),
        ("a.json", b'[{"text": "a"}, {"text": null}]', "row 2"),
        ("a.csv", b"text\n\xe9\n", "cannot be read as csv"),
        ("a.parquet", b"PAR1", "cannot be read as parquet"),
        ("a.txt", b"caf\xe9", "not text in UTF-8"),
        ("a.jsonl", b"", "empty"),
    ],
)
def test_a_fault_is_named_with_its_file_and_line(name: str, content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"(?s){said}") as error:
        read_texts(tmp_path / name)
    assert str(tmp_path / name) in str(error.value)


def test_what_is_fine_has_no_fault(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(BOM + GOOD)
    (tmp_path / "a.csv").write_bytes(b"\xff")
    assert find_fault(tmp_path / "a.jsonl") is None and find_fault(tmp_path / "a.csv") is None
    assert builder_of(Path("a.JSONL.Zst")) == "json" and builder_of(Path("a.gz")) is None
