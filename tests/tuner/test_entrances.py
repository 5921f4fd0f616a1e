# SPDX-License-Identifier: Apache-2.0
"""Every way to load an adapter refuses a damaged one by name, before anything of the model is changed."""

import shutil

import pytest
import torch
from accelerate.hooks import AlignDevicesHook
from peft import (
    AutoPeftModelForCausalLM,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils import load_peft_weights
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from peft_spp import SPPConfig, hotswap_adapter
from peft_spp.inspection import inspect_adapter
from peft_spp.interchange import export_adapter
from peft_spp.merge import merge_checkpoint
from peft_spp.sft.checkpoints import incompleteness

from helpers.merge_cases import edit_json
from helpers.tiny import randomize, tiny_llama
from helpers.unchanged import refused


CONFIG, MASKS, WEIGHTS = "adapter_config.json", "base_masks.json", "adapter_model.safetensors"
SMALL = {"num_hidden_layers": 2}


PREFIX = "base_model.model.model.layers."


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """PEFT writes files of offloaded weights below the working folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with a base model and an adapter of it."""
    folder = tmp_path_factory.mktemp("whole")
    base = tiny_llama(**SMALL)
    base.save_pretrained(folder / "base")
    model = get_peft_model(type(base).from_pretrained(folder / "base"), SPPConfig(r=4, task_type="CAUSAL_LM"))
    randomize(model)
    model.save_pretrained(folder / "adapter")
    return folder


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def drop(part):
    def change(tensors):
        for name in [name for name in tensors if part in name]:
            del tensors[name]

    return change


def put_nan(tensors):
    tensors[f"{PREFIX}1.mlp.up_proj.spp_B.weight"][3] = float("nan")


def put_infinity(tensors):
    tensors[f"{PREFIX}0.self_attn.q_proj.spp_A.weight"][0, 0] = float("-inf")


def rename(tensors):
    for name in list(tensors):
        tensors[name.replace("layers.1.", "layers.7.")] = tensors.pop(name)


def put_a_weight_of_the_base(tensors):
    tensors["base_model.model.model.norm.weight"] = torch.zeros(32)


# what is done to the adapter, and a part of the message
DAMAGES = {
    "nan": (lambda folder: edit_weights(folder, put_nan), "up_proj"),
    "infinity": (lambda folder: edit_weights(folder, put_infinity), "q_proj"),
    "half a module": (lambda folder: edit_weights(folder, drop("1.mlp.down_proj.spp_B")), "down_proj"),
    "without a module": (lambda folder: edit_weights(folder, drop("v_proj")), "v_proj"),
    "without a layer": (lambda folder: edit_weights(folder, drop("layers.1.")), "layers.1."),
    "without a tensor": (lambda folder: edit_weights(folder, dict.clear), "no tensors"),
    "renamed": (lambda folder: edit_weights(folder, rename), "layers.1."),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-9]), WEIGHTS),
    "of another save": (lambda folder: edit_json(folder / CONFIG, weights_id="0" * 32), "different settings"),
    "record of another save": (lambda folder: edit_json(folder / MASKS, weights_id="0" * 32), "different settings"),
    "record is not JSON": (lambda folder: (folder / MASKS).write_text("{"), MASKS),
}


def living(**settings):
    return get_peft_model(tiny_llama(**SMALL), SPPConfig(r=4, task_type="CAUSAL_LM", **settings))


def over_an_existing_one(whole, folder):
    return living(), lambda model: model.load_adapter(folder, "default", is_trainable=True)


def into_a_new_name(whole, folder):
    return living(), lambda model: model.load_adapter(folder, "second")


def from_pretrained(whole, folder):
    return tiny_llama(**SMALL), lambda model: PeftModel.from_pretrained(model, folder)


def with_config(whole, folder):
    config = SPPConfig.from_pretrained(whole / "adapter")
    return tiny_llama(**SMALL), lambda model: PeftModel.from_pretrained(model, folder, config=config)


def by_transformers(whole, folder):
    return tiny_llama(**SMALL), lambda model: model.load_adapter(str(folder))


DEVICE_MAP = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")


def offload(base, folder, layers):
    """A model with its layers on disk, and what PEFT has to be told of it."""
    device_map = DEVICE_MAP | {f"model.layers.{number}": "disk" for number in range(layers)}
    model = AutoModelForCausalLM.from_pretrained(base, device_map=device_map, offload_folder=folder / "offloaded")
    return model, {
        "device_map": {f"base_model.model.{name}": device for name, device in device_map.items()},
        "offload_dir": folder / "offloaded_with_adapter",
        "max_memory": {"cpu": "1GB"},
    }


def offloaded(whole, folder):
    model, options = offload(whole / "base", folder, 2)
    return model, lambda model: PeftModel.from_pretrained(model, folder, **options)


def hotswap(whole, folder):
    return living(), lambda model: hotswap_adapter(model, folder, "default")


ENTRANCES = [
    over_an_existing_one,
    into_a_new_name,
    from_pretrained,
    with_config,
    by_transformers,
    offloaded,
    hotswap,
]


def damaged(whole, tmp_path, damage):
    folder = shutil.copytree(whole / "adapter", tmp_path / "adapter")
    damage(folder)
    return folder


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda one: one.__name__)
def test_a_damaged_adapter_is_refused_at_every_entrance(whole, tmp_path, entrance):
    for number, (name, (damage, named)) in enumerate(DAMAGES.items()):
        folder = damaged(whole, tmp_path / str(number), damage)
        model, load = entrance(whole, folder)
        with refused(model, kind=(ValueError, RuntimeError)) as error:
            load(model)
        assert named in str(error.value), name


@pytest.mark.parametrize("entrance", ENTRANCES, ids=lambda one: one.__name__)
def test_a_whole_adapter_is_loaded_at_every_entrance(whole, tmp_path, entrance):
    model, load = entrance(whole, damaged(whole, tmp_path, lambda folder: None))
    load(model)
    saved = load_file(whole / "adapter" / WEIGHTS)
    loaded = {
        name.replace(".default.", ".").replace(".second.", "."): parameter
        for name, parameter in model.named_parameters()
        if ".spp_" in name and (entrance is not into_a_new_name or ".second." in name)
    }
    assert len(loaded) == len(saved) == 28
    if entrance is not offloaded:
        for name, tensor in loaded.items():
            assert torch.equal(tensor, saved[f"base_model.model.{name.removeprefix('base_model.model.')}"])


def test_tools_refuse_a_damaged_adapter(whole, tmp_path):
    for number, (name, (damage, named)) in enumerate(DAMAGES.items()):
        folder, out = damaged(whole, tmp_path / str(number), damage), tmp_path / f"out{number}"
        for tool in (
            lambda: merge_checkpoint(whole / "base", folder, out),  # noqa: B023
            lambda: inspect_adapter(folder),  # noqa: B023
            lambda: export_adapter(folder, out),  # noqa: B023
        ):
            with pytest.raises(ValueError) as error:
                tool()
            assert named in str(error.value) and not out.exists(), name
        (folder / "trainer_state.json").write_text('{"global_step": 1}')
        assert named in incompleteness(folder), name


@pytest.mark.parametrize("damage", ["nan", "half a module", "without a module", "without a layer", "renamed"])
@pytest.mark.parametrize("bare", [False, True])
def test_a_damaged_state_dict_is_refused(whole, tmp_path, damage, bare):
    folder = damaged(whole, tmp_path, DAMAGES[damage][0])
    state_dict = load_peft_weights(folder, device="cpu")
    config = SPPConfig.from_pretrained(whole / "adapter")
    model = inject_adapter_in_model(config, tiny_llama(**SMALL)) if bare else living()
    with refused(model, DAMAGES[damage][1]):
        set_peft_model_state_dict(model, state_dict)
    if bare:
        plain = tiny_llama(**SMALL)
        with refused(plain, DAMAGES[damage][1]):
            plain.load_adapter(peft_config=config, adapter_state_dict=state_dict)
        assert not plain._hf_peft_config_loaded


def put_too_large(tensors):
    name = f"{PREFIX}0.self_attn.q_proj.spp_A.weight"
    tensors[name] = tensors[name].double().fill_(1e300)


def put_a_layer_of_the_base(tensors):
    tensors[f"{PREFIX}1.mlp.up_proj.base_layer.weight"] = torch.zeros(48, 32)


# what only a model can tell
MISFITS = {"base": (put_a_weight_of_the_base, "norm"), "layer": (put_a_layer_of_the_base, "up_proj.base_layer"),
           "too large": (put_too_large, "q_proj.*too large for torch.float32")}  # fmt: skip


@pytest.mark.parametrize("misfit", list(MISFITS))
def test_what_an_adapter_would_overwrite_or_overflow_is_refused(whole, tmp_path, misfit):
    change, named = MISFITS[misfit]
    folder = damaged(whole, tmp_path, lambda folder: edit_weights(folder, change))
    for entrance in (over_an_existing_one, into_a_new_name, from_pretrained, with_config, by_transformers, hotswap):
        model, load = entrance(whole, folder)
        with refused(model, named, kind=(ValueError, RuntimeError)):
            load(model)
    model = living()
    with refused(model, named):
        set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))


def test_a_module_saved_in_integers_is_refused(whole, tmp_path):
    model = living(modules_to_save=["lm_head"])
    model.save_pretrained(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors.update({n: t.long() for n, t in tensors.items() if "head" in n}))
    for load in (
        lambda: PeftModel.from_pretrained(tiny_llama(**SMALL), tmp_path),
        lambda: model.load_adapter(tmp_path, "default"),
    ):
        with pytest.raises(ValueError, match=r"lm_head.*(I64|int64)"):
            load()


def test_resized_embeddings_are_loaded(whole, tmp_path):
    model = living()
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    loaded = PeftModel.from_pretrained(tiny_llama(**SMALL), tmp_path)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.parametrize("change", ["truncated", "sparse", "meta"])
def test_damaged_pickled_weights_are_named(whole, tmp_path, change):
    folder = damaged(whole, tmp_path, lambda folder: None)
    tensors, file = load_file(folder / WEIGHTS), folder / "adapter_model.bin"
    (folder / WEIGHTS).unlink()
    if change != "truncated":
        tensors = {
            name: tensor.to_sparse() if change == "sparse" else tensor.to("meta") for name, tensor in tensors.items()
        }
    torch.save(tensors, file)
    if change == "truncated":
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"adapter_model\.bin"):
        PeftModel.from_pretrained(tiny_llama(**SMALL), folder)


@pytest.mark.parametrize("settings", [{"spp_alpha": 64}, {"alpha_pattern": {"layers.1.mlp.up_proj": 5}}, {"r": 8}])
def test_other_settings_than_those_of_the_living_adapter_are_refused(whole, settings):
    model = get_peft_model(tiny_llama(**SMALL), SPPConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings}))
    with refused(model, r"different settings|size mismatch", kind=(ValueError, RuntimeError)):
        model.load_adapter(whole / "adapter", "default")
    base, config = tiny_llama(**SMALL), SPPConfig(**{"r": 4, "task_type": "CAUSAL_LM", **settings})
    with refused(base, r"different settings|size mismatch", kind=(ValueError, RuntimeError)):
        PeftModel.from_pretrained(base, whole / "adapter", config=config)


def resized(settings, tokens):
    """A model with an adapter, whose vocabulary has another size."""
    base = tiny_llama(**SMALL)
    base.resize_token_embeddings(tokens)
    return get_peft_model(base, SPPConfig(r=4, task_type="CAUSAL_LM", **settings))


def by_load_adapter(model, folder):
    model.load_adapter(folder, "default")


def by_state_dict(model, folder):
    set_peft_model_state_dict(model, load_peft_weights(folder, device="cpu"))


@pytest.mark.parametrize("load", [by_load_adapter, by_state_dict])
@pytest.mark.parametrize(
    "own, other",
    [
        ({"modules_to_save": ["lm_head"]}, None),
        ({"trainable_token_indices": [3, 4]}, {"trainable_token_indices": [3, 4, 5]}),
        ({}, None),  # embeddings that are saved since their size was changed
    ],
)
def test_what_is_no_factor_and_has_another_shape_is_refused(load, own, other, tmp_path):
    saved = resized(own if other is None else other, 40)
    randomize(saved)
    saved.save_pretrained(tmp_path, save_embedding_layers=not own)
    model = resized(own, 50 if other is None else 40)
    record = model.peft_config["default"].base_record
    with refused(model, r"size mismatch|other tokens", kind=(RuntimeError, ValueError)):
        load(model, tmp_path)
    assert model.peft_config["default"].base_record is record


@pytest.mark.parametrize("load", [by_load_adapter, lambda model, folder: hotswap_adapter(model, folder, "default")])
@pytest.mark.parametrize("own, other", [([3, 4], [5, 6]), ([3, 4], [4, 3]), ({"embed_tokens": [3]}, [4])])
def test_the_rows_of_other_tokens_are_refused(load, own, other, tmp_path):
    saved = living(trainable_token_indices=other)
    saved.save_pretrained(tmp_path)
    with refused(model := living(trainable_token_indices=own), r"trained other tokens than adapter 'default'"):
        load(model, tmp_path)
    same = {"embed_tokens": other} if isinstance(other, list) else other
    load(living(trainable_token_indices=same), tmp_path)


def test_fewer_or_more_targets_than_the_file_has_are_refused(whole, tmp_path):
    for targets in (["q_proj"], ["q_proj", "lm_head"]):
        model = get_peft_model(tiny_llama(**SMALL), SPPConfig(r=4, target_modules=targets))
        with refused(model, r"do not belong|is missing"):
            model.load_adapter(whole / "adapter", "default")


def test_auto_classes_refuse_too(whole, tmp_path):
    folder = damaged(whole, tmp_path, DAMAGES["without a layer"][0])
    with pytest.raises(ValueError, match=r"layers\.1\."):
        AutoPeftModelForCausalLM.from_pretrained(folder)


def test_another_base_is_refused_before_the_hooks_of_an_offloaded_model_are_taken_off(whole, tmp_path):
    tiny_llama(num_hidden_layers=1).save_pretrained(tmp_path / "base")
    smaller, options = offload(tmp_path / "base", tmp_path, 1)
    with refused(smaller, r"layers\.1\."):
        PeftModel.from_pretrained(smaller, whole / "adapter", **options)
    assert isinstance(smaller.model.layers[0].mlp.up_proj._hf_hook, AlignDevicesHook)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / CONFIG).unlink(), f"has no {CONFIG}"),
        (lambda folder: edit_json(folder / CONFIG, peft_type="LORA"), "peft_type 'LORA', but adapter 'default'"),
    ],
)
def test_weights_without_settings_of_ours_are_not_loaded_over_an_adapter(whole, tmp_path, change, message):
    folder = damaged(whole, tmp_path, change)
    model = living()
    with refused(model, message):
        model.load_adapter(folder, "default")
    # with the settings given in code, they are
    if not (folder / CONFIG).exists():
        other = PeftModel.from_pretrained(tiny_llama(**SMALL), folder, config=SPPConfig(r=4, task_type="CAUSAL_LM"))
        assert_same_factors(other, load_file(folder / WEIGHTS))


def assert_same_factors(model, tensors):
    state = get_peft_model_state_dict(model)
    assert state.keys() == tensors.keys() and all(torch.equal(state[name], tensors[name]) for name in tensors)
