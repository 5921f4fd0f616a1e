# SPDX-License-Identifier: Apache-2.0
"""What `peft-spp sft` knows before it loads the model: the run and the dry run refuse the same, by the same check."""

from __future__ import annotations

import copy
import errno
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.utils import logging as hub_logging
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import SFTTrainer
from typer.testing import CliRunner

import peft_spp.sft.run as sft_run
from peft_spp.cli import app
from peft_spp.sft.errors import InputError
from peft_spp.sft.machine import errors_of_the_disk
from peft_spp.sft.run import main
from peft_spp.sft.trainer import carded

from helpers.tiny import tiny
from helpers.trl_cases import SMALL, TEXTS, pruned_model, tiny_tokenizer


CHAT_TEMPLATE = "{% for m in messages %}{% if m.role == 'bad' %}{{ raise_exception('a bad role') }}{% endif %}\
{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pruned model and its tokenizer, without a chat template."""
    return save(tmp_path_factory.mktemp("base"), pruned_model(), tiny_tokenizer())


def save(folder: Path, model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def text_rows(*texts: str | None) -> list[dict[str, Any]]:
    return [{"text": text} for text in (*TEXTS, *texts)]


def chat(*messages: str, role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": message} for message in messages]}


def refused(monkeypatch: pytest.MonkeyPatch, model: Path | str, data: Path, *extra: str) -> str:
    """The message with which both a dry run and a run are refused, with nothing trained and nothing written."""
    monkeypatch.setattr(sft_run, "train", lambda run: pytest.fail("it was trained"))
    out = data.parent / "out"
    arguments = ["--model_name_or_path", str(model), "--dataset_name", str(data), "--output_dir", str(out), *SMALL]
    messages = []
    for dry in ([], ["--dry_run"]):
        with pytest.raises(InputError) as error:
            main([*arguments, *extra, *dry])
        messages.append(str(error.value))
    assert messages[0] == messages[1] and not out.exists()
    return messages[0]


@pytest.mark.parametrize(
    ("rows", "extra", "said"),
    [
        (text_rows(None), [], "Row 21 of the split 'train' has a 'text' that is null"),
        ([*text_rows()[:3], {"text": None}, *text_rows()], [], "Row 4 of the split"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], [], "Row 2 .*'completion'"),
        ([chat("a"), {"messages": None}], ["--chat_template_path", "{template}"], "Row 2 .*'messages' that is null"),
        ([{"text": 5}], [], "Row 1 .* of type int"),
        ([chat("a", "b")] * 3, [], "no chat template. Pass --chat_template_path"),
        ([{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "a", "content": "b"}]}], [], "chat"),
        ([chat("a"), chat("b", role="bad")], ["--chat_template_path", "{template}"], "a bad role"),
        ([{"prompt": "a" * 40, "completion": "b"}] * 3, ["--max_length", "4"], "No rows .*--max_length"),
        (text_rows(), ["--eos_token", "<nope>"], "<nope>"),
        (text_rows(), ["--assistant_only_loss"], "not conversational"),
        (text_rows(), ["--padding_free"], "max_length"),
        (text_rows(), ["--report_to", "wandb"], "wandb"),
        (text_rows(), ["--eval_strategy", "epoch", "--save_strategy", "best", "--test_split_size", "0.2"], "metric"),
        (text_rows(), ["--fp16"], "--fp16 needs a GPU"),
        (text_rows(), ["--push_to_hub"], "Hub token"),
        (text_rows(), ["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
        (text_rows(), ["--spp_target_modules", "("], r"--spp_target_modules: '\(' is not a valid"),
        (text_rows(), ["--spp_exclude_modules", "*x"], r"--spp_exclude_modules: '\*x' is not a valid"),
        (text_rows(), ["--spp_check_base_steps", "-1"], "--spp_check_base_steps"),
    ],
)
def test_a_dry_run_refuses_what_a_run_refuses(
    rows: list[dict[str, Any]],
    extra: list[str],
    said: str,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("peft_spp.sft.machine.get_token", lambda: None)
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    extra = [word.format(template=tmp_path / "chat.jinja") for word in extra]
    message = refused(monkeypatch, base, write(tmp_path / "data.jsonl", rows), *extra)
    assert re.search(said, message), message


def test_the_rows_to_evaluate_on_are_checked_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    write(folder / "train.jsonl", text_rows())
    write(folder / "test.jsonl", text_rows(None))
    assert "Row 21 of the split 'test'" in refused(monkeypatch, base, folder, "--eval_strategy", "epoch")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a"}\n\n{"text": "caf\xe9"}\n', "line 3 .* not text in UTF-8"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', "line 2 .* surrogate"),
        (b'{"text": "a"}\n{"text": \n', "line 2 .* not valid JSON"),
        (b"null\nnull\n", "line 1 .* not a JSON object"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(
    content: bytes, said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data.jsonl").write_bytes(content)
    message = refused(monkeypatch, base, tmp_path / "data.jsonl")
    assert re.search(said, message) and str(tmp_path / "data.jsonl") in message


def test_a_tokenizer_without_an_end_token_is_refused(base: Path, tmp_path: Path, monkeypatch) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.eos_token = None
    model = save(tmp_path / "model", pruned_model(), tokenizer)
    data = write(tmp_path / "data.jsonl", text_rows())
    assert "--eos_token" in refused(monkeypatch, model, data)
    # a token that it has
    main(["--model_name_or_path", str(model), "--dataset_name", str(data), *SMALL, "--eos_token", "a", "--dry_run"])


def test_a_tokenizer_larger_than_the_embeddings_is_refused_where_the_data_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.add_tokens(["<extra>"])
    model = save(tmp_path / "model", pruned_model(), tokenizer)
    plain, extra = write(tmp_path / "plain.jsonl", text_rows()), write(tmp_path / "extra.jsonl", text_rows("<extra>"))
    message = refused(monkeypatch, model, extra)
    assert "'<extra>'" in message and f"embeddings for only {len(tokenizer) - 1}" in message
    main(["--model_name_or_path", str(model), "--dataset_name", str(plain), *SMALL, "--dry_run"])


def test_sequences_longer_than_the_learned_positions_are_refused(tmp_path: Path, monkeypatch) -> None:
    tokenizer = tiny_tokenizer()
    model = tiny("GPT2LMHeadModel", vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=24)
    folder = save(tmp_path / "model", model, tokenizer)
    data = write(tmp_path / "data.jsonl", text_rows())
    assert "--max_length 24" in refused(monkeypatch, folder, data)
    main(["--model_name_or_path", str(folder), "--dataset_name", str(data), *SMALL, "--max_length", "24", "--dry_run"])


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), "no model in safetensors"),
        (lambda file: file.write_bytes(file.read_bytes()[:-8]), "not a readable safetensors file"),
        (lambda file: file.rename(file.with_name("pytorch_model.pkl")), "no model in safetensors"),
        (
            lambda file: file.rename(file.with_name("model.safetensors.index.json")).write_text(
                '{"weight_map": {"lm_head.weight": "model-1.safetensors"}}'
            ),
            "'model-1.safetensors', which is not there",
        ),
    ],
)
def test_weights_that_are_missing_or_damaged_are_refused(
    damage: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(tmp_path / "model", pruned_model(), tiny_tokenizer())
    damage(folder / "model.safetensors")
    assert said in refused(monkeypatch, folder, write(tmp_path / "data.jsonl", text_rows()))


@pytest.mark.parametrize("flag", ["--load_in_4bit", "--load_in_8bit"])
def test_quantization_without_its_package_is_refused(
    flag: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bits = flag[-4]
    monkeypatch.setattr(f"transformers.quantizers.quantizer_bnb_{bits}bit.is_bitsandbytes_available", lambda: False)
    message = refused(monkeypatch, base, write(tmp_path / "data.jsonl", text_rows()), flag)
    assert flag in message and "pip install" in message and "bitsandbytes" in message


def test_the_output_folder_is_checked(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data.jsonl", text_rows())
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below/it"):
        message = refused(monkeypatch, base, data, "--output_dir", str(tmp_path / place))
        assert f"{tmp_path / 'file'} is not a folder" in message
    assert "File name too long" in refused(monkeypatch, base, data, "--output_dir", str(tmp_path / ("x" * 300)))
    # bytes that are not UTF-8 are lone surrogates in Python
    assert "is not UTF-8" in refused(monkeypatch, base, data, "--output_dir", str(tmp_path / "\udcff"))
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and access(path, mode))
    assert f"no permission for {tmp_path}" in refused(monkeypatch, base, data)


@pytest.mark.parametrize(
    ("function", "error", "said"),
    [
        # by `torch.save`, with all that it knows
        (
            "torch.save",
            RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"),
            "PyTorch could not write a file (is the disk full?)",
        ),
        # by a write to a file that is open, without its name
        (
            "trl.SFTTrainer.create_model_card",
            OSError(errno.ENOSPC, "No space left on device"),
            "No space left on device",
        ),
    ],
)
def test_a_disk_that_fills_up_while_training_is_named_with_what_to_do(
    function: str, error: Exception, said: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise error

    data, out = write(tmp_path / "data.jsonl", text_rows()), tmp_path / "out"
    monkeypatch.setattr(function, full)
    with pytest.raises(OSError, match=re.escape(said)) as found:
        arguments = ["--model_name_or_path", str(base), "--dataset_name", str(data), *SMALL, "--max_steps", "1"]
        main([*arguments, "--output_dir", str(out)])
    assert str(out) in str(found.value) and "--resume_from_checkpoint auto" in str(found.value)


def test_other_errors_while_training_stay_what_they_are() -> None:
    for error in (RuntimeError("a bug"), OSError(errno.ENOSPC, "full", "a file"), OSError(errno.EIO, "input/output")):
        with pytest.raises(type(error)) as found, errors_of_the_disk(Path("out")):
            raise error
        assert found.value is error


def test_a_machine_without_a_gpu_names_use_cpu(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    data = write(tmp_path / "data.jsonl", text_rows())
    with pytest.raises(InputError, match=r"--use_cpu.*--bf16 false"):
        main(["--model_name_or_path", str(base), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "~/absent", "a/b/c"])
def test_the_hub_is_not_asked_for_a_path(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub_logging.set_verbosity_error()
    monkeypatch.setattr("peft_spp.checkpoints.hub.snapshot_download", lambda *_, **__: pytest.fail("asked the Hub"))
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the Hub"))
    assert f"no folder {name!r}" in refused(monkeypatch, name, write(tmp_path / "data.jsonl", text_rows()))


def test_a_name_of_the_hub_is_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def not_there(name: str, **kwargs: Any) -> str:
        asked.append(name)
        raise OSError("not there")

    monkeypatch.setattr("peft_spp.checkpoints.hub.snapshot_download", not_there)
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked again"))
    data = write(tmp_path / "data.jsonl", text_rows())
    with pytest.raises(InputError, match="not there"):
        main(["--model_name_or_path", "models/lama", "--dataset_name", str(data), *SMALL, "--dry_run"])
    assert asked == ["models/lama"]


def test_a_refusal_ends_with_2_and_only_the_first_process_prints_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["sft", "--model_name_or_path", str(base), "--dataset_name", str(tmp_path / "absent.jsonl"), *SMALL]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2 and result.stderr.splitlines()[-1].startswith("Error: The data file or folder")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 1, raising=False)
    result = CliRunner().invoke(app, ["sft", "--config"])
    assert result.exit_code == 2 and "Error" not in result.stderr


@pytest.mark.parametrize(
    ("dense", "said"),
    [(0, None), (1, "Warning: 1 of 14 adapted layers have no zeros"), (14, "14 of 14 adapted layers have no zeros")],
)
def test_the_header_says_how_sparse_the_base_is(
    dense: int, said: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = pruned_model()
    for _, layer in zip(range(dense), (m for n, m in model.named_modules() if n.endswith("_proj")), strict=False):
        torch.nn.init.ones_(layer.weight)
    folder = save(tmp_path / "model", model, tiny_tokenizer())
    data = write(tmp_path / "data.jsonl", text_rows())
    arguments = ["--model_name_or_path", str(folder), "--dataset_name", str(data), *SMALL]
    arguments += ["--output_dir", str(tmp_path / "out"), "--learning_rate", "4e-3"]
    shown = []
    for more in (["--dry_run"], ["--max_steps", "1"]):
        main([*arguments, *more])
        shown.append([line for line in capsys.readouterr().err.splitlines() if line.startswith(("Base:", "Warning:"))])
    assert shown[0] == shown[1] and len(shown[0]) == 1 + (said is not None)
    expected = {0: "Base:       2:4, 50 % zero", 14: "Base:       dense, 0 % zero"}
    assert shown[0][0] == expected[dense] if dense in expected else "2:4 in 13 layers, dense in 1" in shown[0][0]
    assert said is None or said in shown[0][1]


def test_a_run_stops_when_something_writes_to_the_base(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard is there: here, another callback fills a pruned place."""

    class Vandal(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            with torch.no_grad():
                layer = kwargs["model"].get_base_model().model.layers[0].mlp.up_proj
                layer.get_base_layer().weight.fill_(1.0)

    original = carded(SFTTrainer)

    def with_vandal(*args: Any, callbacks: list[TrainerCallback], **kwargs: Any) -> Any:
        return original(*args, callbacks=[Vandal(), *callbacks], **kwargs)

    monkeypatch.setattr("peft_spp.sft.recipe.carded", lambda trainer_class: with_vandal)
    data = write(tmp_path / "data.jsonl", text_rows())
    arguments = ["--model_name_or_path", str(base), "--dataset_name", str(data), *SMALL, "--max_steps", "2"]
    with pytest.raises(RuntimeError, match=r"zeros in the weight of module model\.layers\.0\.mlp\.up_proj"):
        main([*arguments, "--output_dir", str(tmp_path / "out"), "--spp_check_base_steps", "1"])
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
