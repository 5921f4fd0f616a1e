# SPDX-License-Identifier: Apache-2.0
"""What an output folder loses and keeps: nothing that is not the old model's, whatever happens."""

import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from peft_spp.checkpoints import output
from peft_spp.checkpoints.output import OutputFolder
from peft_spp.checkpoints.own_files import ADAPTER, MODEL

from helpers.output_folders import NEW, OLD, everything, replace, write


FOREIGN = (
    ".git/config",
    ".gitattributes",
    ".hidden",
    "notes.txt",
    "train.py",
    "data/texts.jsonl",
    "src/__init__.py",
    "checkpoint-5/model.safetensors",
    "checkpoint-5/config.json",
    "sub/other.json",
    "additional_chat_templates/mine.txt",
    "consolidated.safetensors",
    "mine.safetensors",
    "model-1-of-2.safetensors",
    "model-00002-of-00002.safetensors",
    "model-00001-of-00099.safetensors",
    "pytorch_model.bin",
    "optimizer.pt",
    "training_args.bin",
    "tokenizer.json.bak",
    "Config.json",
    "config.json~",
    "readme.md.orig",
    ".out.writing-00000000/model.safetensors",
)
LINKS = ("README.md", "vocab.txt", "linked", "additional_chat_templates", "model-00002-of-00002.safetensors")


class Killed(BaseException):
    """Stands for a process that is killed: after it, no call changes a file any more."""


class Interference:
    """Lets calls that change files fail: one of them, or all from one on."""

    NAMES = ("rename", "replace", "unlink", "rmdir", "mkdir", "remove")

    def __init__(self, at: int, kill: bool) -> None:
        self.left, self.kill = at, kill

    def __enter__(self) -> "Interference":
        self.works = {name: getattr(os, name) for name in self.NAMES}
        for name, works in self.works.items():
            setattr(os, name, self._failing(works))
        return self

    def __exit__(self, *_: object) -> None:
        for name, works in self.works.items():
            setattr(os, name, works)

    def _failing(self, works: Callable) -> Callable:
        def call(*args, **kwargs):
            self.left -= 1
            if self.left == 0 or (self.left < 0 and self.kill):
                raise Killed if self.kill else OSError(errno.EIO, "broken")
            return works(*args, **kwargs)

        return call


@st.composite
def foreign_entries(draw: st.DrawFn) -> tuple[list[str], list[str], bool]:
    files = draw(st.lists(st.sampled_from(FOREIGN), unique=True, max_size=3))
    links = draw(st.lists(st.sampled_from(LINKS), unique=True, max_size=2))
    return files, links, draw(st.booleans())


def place(folder: Path, foreign: tuple[list[str], list[str], bool]) -> dict[str, str]:
    files, links, empty = foreign
    before = everything(folder)
    for name in links:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder.parent / "elsewhere", target_is_directory=True)
        before = {one: text for one, text in before.items() if one != name and not one.startswith(f"{name}/")}
    write(folder, {name: f"mine {name}" for name in files if name.split("/")[0] not in links})
    if empty:
        (folder / "empty").mkdir()
    return {name: text for name, text in everything(folder).items() if name not in before}


@settings(max_examples=100, deadline=None)
@example(kind=MODEL, foreign=([], ["README.md"], True), late=True, in_place=False, at=13, kill=False)
@example(kind=ADAPTER, foreign=([], [], False), late=False, in_place=True, at=24, kill=False)
@example(kind=MODEL, foreign=([], [], False), late=False, in_place=True, at=20, kill=False)
@example(kind=MODEL, foreign=([], [], False), late=False, in_place=True, at=30, kill=False)
@given(
    kind=st.sampled_from([MODEL, ADAPTER]),
    foreign=foreign_entries(),
    late=st.booleans(),
    in_place=st.booleans(),
    at=st.integers(1, 40),
    kill=st.booleans(),
)
def test_nothing_foreign_is_ever_lost(kind, foreign, late, in_place, at, kill):
    """Whether it is there from the start or comes while the command works, and whether a call fails or the process."""
    with tempfile.TemporaryDirectory() as work, pytest.MonkeyPatch.context() as patch:
        root = Path(work).resolve()
        folder = root / "out"
        (root / "elsewhere").mkdir()
        write(root / "elsewhere", {"precious.txt": "mine"})
        write(folder, OLD[kind])
        if in_place:
            patch.setattr(output, "can_be_renamed", lambda _: False)
        old = everything(folder)
        mine = {} if late else place(folder, foreign)
        expected = everything(folder)

        def before_publishing() -> None:
            if late:
                mine.update(place(folder, foreign))

        finished = False
        try:
            with Interference(at, kill):
                replace(folder, kind, before_publishing)
            finished = True
        except (OSError, Killed) as error:
            put_back = "its files are in" not in str(error)
        else:
            put_back = True
        found = everything(root)
        assert found["elsewhere/precious.txt"] == "mine"
        held = [*found.values()]
        for name, text in mine.items():
            assert text in held, name
            if not kill and put_back:
                assert found[f"out/{name}"] == text
        new = {f"out/{name}": text for name, text in NEW.items()}
        if finished:
            assert not mine and new.items() <= found.items()
            # what could not be removed is left in a hidden folder, and a warning names it
            assert {name for name in found if re.match(r"out/(?!\.out\.(replaced|writing)-)", name)} == new.keys()
        elif not new.items() <= found.items():
            # the old model is there, in its place or in one piece next to it
            kept = {} if late else expected
            places = [folder, *root.glob(".out.replaced-*"), *folder.glob(".out.replaced-*")]
            present = {name for one in places if one.exists() for name in everything(one)}
            assert (kept.keys() or (old.keys() - set(foreign[1]))) - present - _hidden_by(foreign) == set()


def _hidden_by(foreign: tuple[list[str], list[str], bool]) -> set[str]:
    """Files of the old model that a link of the test itself took the place of."""
    return {"additional_chat_templates/tool.jinja"} if "additional_chat_templates" in foreign[1] else set()


@pytest.mark.parametrize("name", FOREIGN)
@pytest.mark.parametrize("kind", [MODEL, ADAPTER])
def test_a_foreign_file_is_refused_by_name(tmp_path, kind, name):
    write(tmp_path / "out", {**OLD[kind], name: "mine"})
    before = everything(tmp_path)
    with pytest.raises(FileExistsError) as error:
        replace(tmp_path / "out", kind)
    assert name in str(error.value)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", [MODEL, ADAPTER])
def test_only_known_files_are_replaced(tmp_path, kind):
    write(tmp_path / "out", OLD[kind])
    out = OutputFolder(tmp_path / "out", True, kind)
    out.check(1)
    assert out.replaced == tuple(sorted(OLD[kind]))
    replace(tmp_path / "out", kind)
    assert everything(tmp_path / "out") == NEW


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{}"),
        ("config.json", '{"port": 80}'),
        ("config.json", "not json"),
        ("config.json", "[1]"),
        ("config.json", '{"model_type": "car"}'),
        ("model.safetensors", "weights without a configuration"),
    ],
)
def test_a_config_json_that_is_not_a_models_does_not_make_a_folder_one(tmp_path, name, text):
    write(tmp_path / "out", {name: text, "README.md": "mine", "vocab.txt": "mine"})
    with pytest.raises(FileExistsError, match=r"README\.md"):
        replace(tmp_path / "out", MODEL)
    assert everything(tmp_path / "out") == {name: text, "README.md": "mine", "vocab.txt": "mine"}


def test_weights_that_the_configuration_names_are_replaced(tmp_path):
    old = {
        "config.json": '{"model_type": "llama", "transformers_weights": "w/fp8.safetensors.index.json"}',
        "w/fp8.safetensors.index.json": '{"weight_map": {"a": "one.safetensors"}}',
        "w/one.safetensors": "old",
    }
    write(tmp_path / "out", old)
    replace(tmp_path / "out", MODEL)
    assert everything(tmp_path / "out") == NEW
    write(tmp_path / "other", {**old, "one.safetensors": "mine"})
    with pytest.raises(FileExistsError, match=r"lost: one\.safetensors"):
        replace(tmp_path / "other", MODEL)


def test_a_file_with_the_content_that_is_written_is_not_lost(tmp_path):
    write(tmp_path / "out", {**OLD[MODEL], "modeling_x.py": "code", "1_Pooling/config.json": "{}"})
    write(tmp_path / "base", {"modeling_x.py": "code", "1_Pooling/config.json": "{}"})
    copied = {Path(name): tmp_path / "base" / name for name in ("modeling_x.py", "1_Pooling/config.json")}
    out = OutputFolder(tmp_path / "out", True, MODEL)
    out.check(1, copied)
    write(tmp_path / "out", {"modeling_x.py": "code with changes"})
    with pytest.raises(FileExistsError, match=r"modeling_x\.py"):
        OutputFolder(tmp_path / "out", True, MODEL).check(1, copied)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_what_is_not_a_file_is_refused_by_name(tmp_path):
    write(tmp_path / "out", OLD[MODEL])
    (tmp_path / "out" / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "out" / "tokenizer.json")
    with pytest.raises(FileExistsError, match=r"tokenizer\.json"):
        replace(tmp_path / "out", MODEL)


def test_a_working_folder_that_stays_is_named(tmp_path, monkeypatch):
    write(tmp_path / "out", OLD[MODEL])
    monkeypatch.setattr(output, "can_be_renamed", lambda _: False)
    monkeypatch.setattr(output.shutil, "rmtree", lambda *_, **__: None)
    with pytest.warns(UserWarning, match=r"\.writing-\w+, which the new files were written in, could not be removed"):
        replace(tmp_path / "out", MODEL)
