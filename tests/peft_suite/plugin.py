# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin that puts SPP where PEFT's own tests list the methods they run."""

from __future__ import annotations

import re
from types import ModuleType

import pytest

from peft_spp import SPPConfig


_CUSTOM = [
    ("Vanilla MLP 1 SPP", "MLP", SPPConfig, {"target_modules": "lin0"}),
    ("Vanilla MLP 2 SPP", "MLP", SPPConfig, {"target_modules": ["lin0"]}),
    ("Vanilla MLP 3 SPP", "MLP", SPPConfig, {"target_modules": ["lin1"]}),
    ("Vanilla MLP 4 SPP", "MLP", SPPConfig, {"target_modules": ["lin0", "lin1"]}),
    ("Vanilla MLP 5 SPP", "MLP", SPPConfig, {"target_modules": ["lin0"], "modules_to_save": ["lin1"]}),
    ("Vanilla MLP 6 SPP", "MLP", SPPConfig, {"target_modules": ["lin0"], "spp_dropout": 0.1}),
    ("Vanilla MLP 7 SPP", "MLP", SPPConfig, {"target_modules": ["lin0", "lin1"], "r": 3, "spp_alpha": 4}),
    ("Vanilla MLP 8 SPP", "MLP", SPPConfig, {"target_modules": ["lin0"], "bias": "none", "rank_pattern": {"lin0": 5}}),
    ("Embedding + transformers Conv1D 1 SPP", "EmbConv1D", SPPConfig, {"target_modules": ["conv1d"]}),
]
_MULTIPLE = [
    (
        "SPP Same",
        "spp",
        SPPConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin0"], "init_weights": False},
    ),
    (
        "SPP Different",
        "spp",
        SPPConfig,
        {"target_modules": ["lin0"], "init_weights": False},
        {"target_modules": ["lin1"], "init_weights": False},
    ),
]


def _by_task(task_type: str) -> list:
    return [(SPPConfig, {"task_type": task_type, "target_modules": None})]


_ALL_CONFIGS = {
    "test_decoder_models": _by_task("CAUSAL_LM"),
    "test_encoder_decoder_models": _by_task("SEQ_2_SEQ_LM"),
    "test_feature_extraction_models": _by_task("FEATURE_EXTRACTION"),
    "test_seq_classifier": _by_task("SEQ_CLS"),
}


def put_spp_into(module: ModuleType) -> None:
    """Replace the contents of the module's lists of methods; the lists themselves are what the tests refer to."""
    name = module.__name__.rpartition(".")[2]
    if name == "test_custom_models":
        module.TEST_CASES[:] = _CUSTOM
        module.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = _MULTIPLE
        # these name the prefixes and the modules of each method
        if hasattr(module, "PREFIXES"):
            module.PREFIXES[SPPConfig] = "spp_"
    elif name in _ALL_CONFIGS:
        module.ALL_CONFIGS[:] = _ALL_CONFIGS[name]
    elif name == "test_token_classification_qa":
        module.TOKEN_CLS_CONFIGS[:] = _by_task("TOKEN_CLS")
        module.QA_CONFIGS[:] = _by_task("QUESTION_ANS")
    elif name == "test_torch_compile":
        module.SETTINGS.clear()
        module.SETTINGS["spp"] = (SPPConfig(task_type="CAUSAL_LM"), {})


# Tests of the modules written for LoRA that cannot be asked of SPP, and why. A name ends at a word boundary.
_NOT_ASKED = {
    "_large": "the fixture adapts an embedding, which SPP does not",
    "_irregular": "the fixture adapts an embedding, which SPP does not",
    "test_model_with_injected_layers": "the fixture adapts an embedding, which SPP does not",
    "ModelAndLayerStatus::test_target_parameters": "the fixture adapts an embedding, which SPP does not",
    "ModelAndLayerStatus::test_model_target_parameters": "the fixture adapts an embedding, which SPP does not",
    "test_disable_adapter[trl-internal-testing/tiny-Llama4": "two runs differ in their last bits, with LoRA as well",
    "with_weight_conversion": "PEFT converts the adapters of older Transformers for LoRA only",
    "test_target_multiple_parameters_on_same_module": "counts the calls of a class of LoRA's",
    "test_target_parameters_forward_under_autocast": "counts the calls of a class of LoRA's",
    "test_target_parameter_result_caching_works": "counts the calls of a class of LoRA's",
    "test_weighted_combination_of_adapters": "asserts that experts cannot be combined, which SPP's can",
    "stable_diffusion": "the model is on the Hub only",
    "layers_diffusion": "the model is on the Hub only",
    "test_transformers_model": "the adapter is on the Hub only",
    "test_transformer_model_without_adapter_raises": "the model is on the Hub only",
    "test_base_model_type_transformers_automodel": "the adapter is on the Hub only",
    "test_get_peft_model_state_dict": "asserts 'lora' in the keys",
    "test_module_matching_lora": "asserts LoRA's default targets, which are fewer",
    "test_model_status_with_modules_to_save": "asserts LoRA's number of parameters",
    "test_model_status_with_trainable_tokens": "asserts LoRA's number of parameters",
    "test_nb_params_small": "asserts LoRA's number of parameters",
    "PeftMixedModel": "PEFT's mixed model knows its tuners by name",
    "mixed_model": "PEFT's mixed model knows its tuners by name",
    "realistic_example": "asserts the names in a model of a fixed size on the Hub",
    "test_config.py::TestPeftConfig::test_from_pretrained[": "the adapter is on the Hub only",
    "test_config.py::TestPeftConfig::test_from_pretrained_cache_dir": "the adapter is on the Hub only",
    "test_save_pretrained_with_runtime_config": "the adapter is on the Hub only",
    "test_save_pretrained_warns_for_unsharded_state_dict": "PEFT looks for LoRA's keys",
}


# The classes of test_initialization that are about every method and not about LoRA's own variants.
_GENERAL_INITIALIZATION = (
    "TestNoInfiniteRecursionDeepspeed",
    "TestCustomModelConfigWarning",
    "TestLowCpuMemUsage",
    "TestNamingConflictWarning",
    "TestLoadPeftKeyMapping",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    general = [
        item
        for item in items
        if item.path.stem != "test_initialization"
        or item.parent.name in _GENERAL_INITIALIZATION
        or re.search("target_(module_nor_target_)?parameter", item.name)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in general])
    items[:] = general
    for item in items:
        if item.path.stem in (
            "test_config",
            "test_low_level_api",
            "test_tuners_utils",
            "test_initialization",
            "test_target_parameters",
        ):
            reasons = [reason for name, reason in _NOT_ASKED.items() if name in item.nodeid]
            if reasons:
                item.add_marker(pytest.mark.skip(reason=f"not asked of SPP: {reasons[0]}"))


_seen: set[str] = set()


@pytest.hookimpl(tryfirst=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    module = metafunc.module
    if module.__name__ not in _seen:
        _seen.add(module.__name__)
        put_spp_into(module)
