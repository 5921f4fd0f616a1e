# SPDX-License-Identifier: Apache-2.0
"""The settings of an adapter as flags."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_spp import SPPConfig
from peft_spp.sft import checkpoints
from peft_spp.sft.arguments import parse_arguments
from peft_spp.sft.errors import InputError
from peft_spp.sft.methods import METHODS
from peft_spp.sft.spp_arguments import WITHOUT_A_FLAG, SPPArguments, flag_of


RUN = ("--model_name_or_path", "x", "--dataset_name", "y", "--use_cpu", "--bf16", "false")
# a value that is not the default for each setting: as words, and as the configuration has it
GIVEN: dict[str, tuple[list[str], Any]] = {
    "r": (["8"], 8),
    "spp_alpha": (["3.5"], 3.5),
    "spp_dropout": (["0.5"], 0.5),
    "target_modules": (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
    "exclude_modules": ([".*lm_head"], ".*lm_head"),
    "target_parameters": (
        ["experts.gate_up_proj", "experts.down_proj"],
        ["experts.gate_up_proj", "experts.down_proj"],
    ),
    "layers_to_transform": (["0", "2"], [0, 2]),
    "layers_pattern": (["layers"], ["layers"]),
    "rank_pattern": (['{"q_proj": 4}'], {"q_proj": 4}),
    "alpha_pattern": (['{"q_proj": 1.5}'], {"q_proj": 1.5}),
    "modules_to_save": (["lm_head"], ["lm_head"]),
    "trainable_token_indices": (["5", "7"], [5, 7]),
    "ensure_weight_tying": (["true"], True),
    "bias": (["spp_only"], "spp_only"),
    "init_weights": (["positive"], "positive"),
    "check_base": (["error"], "error"),
}


def config_of(*words: str) -> SPPConfig:
    arguments = parse_arguments([*RUN, *words], METHODS["dpo"])
    return arguments.spp.to_config(arguments.method.task_type)


def test_every_setting_has_a_flag_or_a_reason_not_to() -> None:
    settings = {one.name for one in fields(SPPConfig)}
    assert WITHOUT_A_FLAG.keys() < settings
    assert settings - WITHOUT_A_FLAG.keys() == GIVEN.keys()
    flags = {one.name for one in fields(SPPArguments)}
    assert {flag_of(name) for name in GIVEN} == flags - {"spp_check_base_steps", "dry_run"}


def test_the_defaults_are_those_of_the_configuration() -> None:
    found, default = config_of(), SPPConfig(task_type="CAUSAL_LM")
    assert {name: getattr(found, name) for name in GIVEN} == {name: getattr(default, name) for name in GIVEN}


@pytest.mark.parametrize("in_yaml", [False, True], ids=["flags", "yaml"])
@pytest.mark.parametrize("name", GIVEN)
def test_a_setting_arrives(name: str, in_yaml: bool, tmp_path: Path) -> None:
    words, expected = GIVEN[name]
    assert getattr(SPPConfig(), name) != expected
    more = ["--spp_layers_to_transform", "1"] if name == "layers_pattern" else []
    if in_yaml:
        value = list(expected) if isinstance(expected, set) else expected
        (tmp_path / "run.yaml").write_text(yaml.safe_dump({flag_of(name): value}))
        found = config_of("--config", str(tmp_path / "run.yaml"), *more)
    else:
        found = config_of(f"--{flag_of(name)}", *words, *more)
    assert getattr(found, name) == expected


@pytest.mark.parametrize(
    ("words", "name", "expected"),
    [
        (["--spp_target_modules", "all-linear"], "target_modules", "all-linear"),
        (["--spp_trainable_token_indices", '{"embed_tokens": [1]}'], "trainable_token_indices", {"embed_tokens": [1]}),
        (["--spp_trainable_token_indices", "[1, 2]"], "trainable_token_indices", [1, 2]),
        (["--spp_init_weights", "false"], "init_weights", False),
    ],
)
def test_other_forms_of_a_value(words: list[str], name: str, expected: Any) -> None:
    assert getattr(config_of(*words), name) == expected


@pytest.mark.parametrize(
    ("given", "name", "expected"),
    [
        ({"spp_target_modules": "all-linear"}, "target_modules", "all-linear"),
        ({"spp_target_modules": "q_proj|k_proj"}, "target_modules", "q_proj|k_proj"),
        ({"spp_modules_to_save": "lm_head"}, "modules_to_save", ["lm_head"]),
        ({"spp_init_weights": False}, "init_weights", False),
        (
            {"spp_trainable_token_indices": {"embed_tokens": [1]}},
            "trainable_token_indices",
            {"embed_tokens": [1]},
        ),
    ],
)
def test_other_forms_in_yaml(given: dict[str, Any], name: str, expected: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(given))
    assert getattr(config_of("--config", str(tmp_path / "run.yaml")), name) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--spp_rank_pattern", "{q_proj: 4}"], "--spp_rank_pattern is not valid JSON: '{q_proj: 4}'"),
        (["--spp_alpha_pattern", "[1]"], r"--spp_alpha_pattern should be a JSON object .* '\[1\]'"),
        (["--spp_rank_pattern", '{"q_proj": 0}'], "rank_pattern"),
        (["--spp_trainable_token_indices", "a", "b"], "--spp_trainable_token_indices should be indices .* a b"),
        (["--spp_trainable_token_indices", "[1"], "--spp_trainable_token_indices is not valid JSON"),
        (["--spp_trainable_token_indices", '{"embed_tokens": "x"}'], "trainable_token_indices"),
        (["--spp_init_weights", "maybe"], "choose from"),
        (["--spp_check_base", "maybe"], "choose from"),
        (["--spp_layers_pattern", "layers"], "layers_to_transform"),
    ],
)
def test_a_value_that_cannot_be_used_is_named(words: list[str], said: str) -> None:
    with pytest.raises(InputError, match=said):
        config_of(*words)


def of_yaml(text: str, tmp_path: Path, method: str = "sft") -> Any:
    """The arguments of a YAML file."""
    (tmp_path / "run.yaml").write_text(text)
    return parse_arguments([*RUN, "--config", str(tmp_path / "run.yaml")], METHODS[method])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("spp_init_weights: [1]", r"--spp_init_weights: \[1\] in the YAML file is not one of true, false, positive"),
        ("spp_bias: no", "--spp_bias: False in the YAML file is not one of none, all, spp_only"),
        ("lr_scheduler_type: steep", "--lr_scheduler_type: 'steep' in the YAML file is not one of linear"),
        ("spp_r: 4.0", "--spp_r: 4.0 in the YAML file is not of type int"),
        ("max_steps: 4.5", "--max_steps: 4.5 in the YAML file is not of type int"),
        ("max_steps: true", "--max_steps: True in the YAML file is not of type int"),
        ("learning_rate:", "--learning_rate: its empty value in the YAML file is not of type float"),
        ("learning_rate: fast", "--learning_rate: 'fast' in the YAML file is not of type float"),
        ("per_device_train_batch_size: [2]", r"--per_device_train_batch_size: \[2\] in the YAML file"),
        ("packing: 3", "--packing: 3 in the YAML file is not of type bool"),
        ("spp_layers_to_transform: [a]", "--spp_layers_to_transform: 'a' in the YAML file is not of type int"),
        ("config: other.yaml", "--config other.yaml would not be read"),
        ("max_length: -4", "--max_length -4 cannot be used"),
        ("gradient_checkpointing_kwargs: x", "--gradient_checkpointing_kwargs: 'x' is not valid JSON"),
        ("dataset_kwargs: [1]", r"--dataset_kwargs: \[1\] is not a JSON object"),
    ],
)
def test_a_value_of_a_yaml_file_is_checked_as_on_the_command_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        of_yaml(text, tmp_path)


@pytest.mark.parametrize(
    ("text", "name", "expected"),
    [
        # YAML reads `no` and `off` as false
        ("eval_strategy: no", "eval_strategy", "no"),
        ("learning_rate: 4e-3", "learning_rate", 4e-3),
        ("max_length: null", "max_length", None),
        ("max_length: none", "max_length", None),
        ("max_steps: '5'", "max_steps", 5),
        ("report_to: [none]", "report_to", []),
        ("model_init_kwargs: {dtype: float32}", "model_init_kwargs", {"dtype": "float32"}),
        ("save_steps: 1", "save_steps", 1),
        # the default, though the type has no None
        ("debug: null", "debug", []),
    ],
)
def test_a_value_of_a_yaml_file_arrives(text: str, name: str, expected: Any, tmp_path: Path) -> None:
    assert getattr(of_yaml(text, tmp_path).training, name) == expected


def test_other_values_of_a_yaml_file_arrive(tmp_path: Path) -> None:
    # a flag that the command line splits into letters
    assert of_yaml("reward_clip_range: [-5, 5]", tmp_path, "rloo").training.reward_clip_range == [-5, 5]
    assert of_yaml("spp_check_base: off", tmp_path).spp.to_config("CAUSAL_LM").check_base == "off"
    assert of_yaml("spp_trainable_token_indices: 5", tmp_path).spp.to_config("CAUSAL_LM").trainable_token_indices == [
        5
    ]
    # a number of rows, and not a share
    assert of_yaml("test_split_size: 3", tmp_path).mixture.test_split_size == 3
    assert type(of_yaml("test_split_size: 3", tmp_path).mixture.test_split_size) is int
    (tmp_path / "mixture.yaml").write_text("datasets: [a.jsonl, {path: b.jsonl}]")
    words = ["--model_name_or_path", "x", "--use_cpu", "--bf16", "false", "--config", str(tmp_path / "mixture.yaml")]
    assert [one.path for one in parse_arguments(words, METHODS["sft"]).mixture.datasets] == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--config", "{yaml}", "--config", "{yaml}"], "Pass one YAML file"),
        (["--conf", "{yaml}"], "--config .* would not be read"),
        (["--config", "{latin}"], "The YAML file .*latin.yaml is not text in UTF-8"),
        (["--model_init_kwargs", "{{'a': 1}}"], "--model_init_kwargs: .* is not valid JSON"),
        (["--lr_scheduler_kwargs", "3"], "--lr_scheduler_kwargs: '3' is not a JSON object"),
    ],
)
def test_a_file_that_would_not_be_read_and_objects_that_are_none_are_named(
    words: list[str], said: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text("spp_r: 4\n")
    (tmp_path / "latin.yaml").write_bytes("output_dir: café\n".encode("latin-1"))
    files = {"yaml": tmp_path / "run.yaml", "latin": tmp_path / "latin.yaml"}
    with pytest.raises(InputError, match=said):
        config_of(*(word.format(**files) for word in words))


@pytest.mark.parametrize(("request_", "found"), [(True, "checkpoint-3"), (False, None), (None, None)])
def test_a_checkpoint_that_a_yaml_file_asks_for(
    request_: bool | None, found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "last_complete_checkpoint", lambda folder: "checkpoint-3")
    assert checkpoints.find_checkpoint(request_, "out") == found
