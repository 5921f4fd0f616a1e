# SPDX-License-Identifier: Apache-2.0
"""The settings of an adapter as flags."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from peft_spp import SPPConfig
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


def test_a_word_of_a_yaml_file_that_is_no_choice_is_named(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("spp_init_weights: [1]\n")
    with pytest.raises(InputError, match=r"--spp_init_weights should be true, false or positive, but it is \[1\]"):
        config_of("--config", str(tmp_path / "run.yaml"))
