# SPDX-License-Identifier: Apache-2.0
"""Targets that cannot be adapted, and adapters that cannot be added: by name, and with the model unchanged."""

import pytest
import torch
from peft import TaskType, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

from peft_spp import SPPConfig

from helpers.tiny import tiny, tiny_llama
from helpers.unchanged import refused


ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HEADS = {
    "TOKEN_CLS": ("BertForTokenClassification", "classifier"),
    "QUESTION_ANS": ("BertForQuestionAnswering", "qa_outputs"),
    "SEQ_CLS": ("BertForSequenceClassification", "classifier"),
}
IDS = torch.arange(3, 11).reshape(2, 4)


def adapted(model) -> set[str]:
    return {
        name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, BaseTunerLayer)
    }


class Grouped(nn.Module):
    """Block-diagonal layers next to plain ones of the same name, with shapes that happen to fit."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (nn.Linear(8, 8), DeepseekV4GroupedLinear(8, 8, 1), Doubled(8, 8), nn.Linear(8, 8))
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": kind, "out": nn.Linear(8, 8)}) for kind in kinds])

    def forward(self, x):
        for layer in self.layers:
            proj = layer["proj"]
            x = layer["out"](proj(x[:, None]).flatten(1) if isinstance(proj, DeepseekV4GroupedLinear) else proj(x))
        return x


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Calls(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


def test_a_subclass_with_its_own_call_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), Calls(8, 8))
    with refused(model, r"'1'.*overrides `__call__`"):
        get_peft_model(model, SPPConfig(target_modules=["0", "1"]))


def test_a_forward_pass_that_is_set_on_a_layer_is_looked_at():
    def model_with(factor: float) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        original = model[1].forward
        model[1].forward = lambda x: factor * original(x)
        return model

    with pytest.raises(ValueError, match=r"'1'.*does not compute"):
        get_peft_model(model_with(2.0), SPPConfig(target_modules=["0", "1"]))
    model = get_peft_model(model_with(1.0), SPPConfig(r=2, target_modules=["0", "1"], init_weights=False))
    x = torch.randn(3, 8)
    torch.testing.assert_close(model(x), model.merge_and_unload()(x))


@pytest.mark.parametrize("targets", [None, "all-linear"])
def test_a_subclass_with_another_map_is_left_out_by_name(targets):
    with pytest.warns(UserWarning, match=r"2 layers .*layers\.1\.proj: DeepseekV4GroupedLinear.*layers\.2\.proj: Dou"):
        model = get_peft_model(Grouped(), SPPConfig(r=2, target_modules=targets, init_weights=False))
    assert adapted(model) == {f"layers.{i}.out" for i in range(4)} | {"layers.0.proj", "layers.3.proj"}
    x = torch.randn(3, 8)
    unmerged = model(x)
    torch.testing.assert_close(unmerged, model.merge_and_unload()(x))


def test_layers_to_transform_holds_next_to_such_a_subclass():
    with pytest.warns(UserWarning, match="not adapted"):
        model = get_peft_model(nn.ModuleDict({"model": Grouped()}), SPPConfig(r=2, layers_to_transform=[2, 3]))
    assert adapted(model) == {"model.layers.2.out", "model.layers.3.out", "model.layers.3.proj"}


@pytest.mark.parametrize("targets", [["proj"], ["layers.2.proj"], r".*\.2\.proj"])
def test_a_subclass_with_another_map_is_refused_where_it_is_named(targets):
    model = Grouped()
    with refused(model, r"layers\.[12]\.proj.*(Grouped|Doubled).*exclude_modules"):
        get_peft_model(model, SPPConfig(r=2, target_modules=targets))


def test_deepseek_v4():
    settings = {
        "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 16,
        "q_lora_rank": 16, "o_groups": 2, "o_lora_rank": 8, "qk_rope_head_dim": 8, "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "index_n_heads": 2, "index_head_dim": 16,
        "index_topk": 4, "num_hash_layers": 0, "hc_mult": 2, "sliding_window": 8,
    }  # fmt: skip
    with pytest.warns(UserWarning, match=r"o_a_proj: DeepseekV4GroupedLinear"):
        model = get_peft_model(tiny("DeepseekV4ForCausalLM", **settings), SPPConfig(r=2, target_parameters=[]))
    assert any("o_b_proj" in name for name in adapted(model)) and not any(
        "o_a_proj" in name for name in adapted(model)
    )
    assert model(input_ids=IDS).logits.isfinite().all()


@pytest.mark.parametrize("targets", [None, "all-linear", "ALL", "heads", "regex"])
@pytest.mark.parametrize("task", list(HEADS))
def test_a_head_that_the_task_trains_whole_is_not_adapted(task, targets):
    class_name, head = HEADS[task]
    chosen = {"ALL": "ALL-LINEAR", "heads": ["query", head], "regex": r".*(query|classifier|qa_outputs)"}
    model = get_peft_model(
        tiny(class_name, **ENCODER), SPPConfig(r=2, task_type=task, target_modules=chosen.get(targets, targets))
    )
    assert adapted(model) and not any(head in name for name in adapted(model))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad and ".spp_" not in name}
    assert trainable == {f"base_model.model.{head}.modules_to_save.default.{kind}" for kind in ("weight", "bias")}
    model.add_adapter("second", SPPConfig(r=2, task_type=task, target_modules=chosen.get(targets, targets)))
    assert not any(head in name for name in adapted(model))


@pytest.mark.parametrize("task", list(HEADS))
def test_such_an_adapter_is_saved_and_loaded(task, tmp_path):
    from peft import PeftModel

    class_name, head = HEADS[task]
    base = tiny(class_name, **ENCODER)
    model = get_peft_model(base, SPPConfig(r=2, task_type=task, target_modules="all-linear", init_weights=False))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and head in name:
                p.add_(0.5)
    expected = model.eval()(input_ids=IDS)[0]
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(class_name, **ENCODER), tmp_path).eval()
    assert torch.equal(loaded(input_ids=IDS)[0], expected)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.conv = nn.Conv1d(4, 4, 1)
        self.mlp = nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)})
        self.heads = nn.ModuleList([nn.Linear(4, 2)])
        self.embed = nn.Embedding(5, 4)
        self.int_lin = nn.Linear(4, 4).requires_grad_(False)
        self.int_lin.weight.data = self.int_lin.weight.data.to(torch.int8)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x):
        return self.q_proj(x)


KINDS = {
    "saved-by-end": ({"target_modules": ["q_proj"], "modules_to_save": ["proj"]}, r"'q_proj'.*'proj'"),
    "inside-saved": ({"target_modules": ["up"], "modules_to_save": ["lp"]}, r"'mlp\.up'.*'mlp'.*'lp'"),
    "list-saved": ({"target_modules": ["q_proj"], "modules_to_save": ["heads"]}, "ModuleList"),
    "no-embedding": ({"target_modules": ["q_proj"], "trainable_token_indices": {"tokens": [1]}}, "tokens"),
    "convolution": ({"target_modules": ["q_proj", "conv"]}, "'conv'"),
    "integers": ({"target_modules": ["q_proj", "int_lin"]}, "'int_lin'.*int8"),
    "embedding": ({"target_modules": ["q_proj", "embed"]}, "'embed'"),
    "container": ({"target_modules": ["q_proj", "mlp"]}, "'mlp'"),
    "nothing": ({"target_modules": ["other"]}, "other"),
    "parameter-of-a-target": ({"target_modules": ["q_proj"], "target_parameters": ["q_proj.bias"]}, "q_proj"),
    "parameter-of-1d": ({"target_modules": [], "target_parameters": ["embed.weight", "q_proj.bias"]}, "q_proj"),
    "default-without-blocks": ({}, "target_modules"),
    "no-generation": ({"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}, "prepare_inputs_for_generation"),
}


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_failed_injection_leaves_everything_unchanged(kind, first):
    settings, message = KINDS[kind]
    if first and kind in ("no-generation", "default-without-blocks"):
        pytest.skip("the task belongs to the first adapter")
    model = Parts()
    if first:
        model = get_peft_model(model, SPPConfig(r=2, target_modules=["q_proj", "frozen"]))
    with refused(model, message, (ValueError, TypeError, AttributeError, RuntimeError)):
        config = SPPConfig(r=2, **settings)
        given = {key: getattr(config, key) for key in ("target_modules", "modules_to_save")}
        model.add_adapter("second", config) if first else get_peft_model(model, config)
    assert given == {key: getattr(config, key) for key in given}
    if first:
        assert list(model.peft_config) == ["default"]
        model.add_adapter("second", SPPConfig(r=2, target_modules=["down"]))
    else:
        get_peft_model(model, SPPConfig(r=2, target_modules=["q_proj"]))
    assert model(torch.randn(2, 4)).isfinite().all()


def test_a_task_of_a_language_model_needs_its_head():
    base = tiny("BertModel", **ENCODER)
    with refused(base, r"BertModel has no `prepare_inputs.*head of a language model", AttributeError):
        get_peft_model(base, SPPConfig(r=2, task_type=TaskType.CAUSAL_LM))
    # Transformers' own method does not wrap the model for a task
    base.add_adapter(SPPConfig(r=2, task_type=TaskType.CAUSAL_LM))
    assert any(".spp_A." in name for name, _ in base.named_parameters())


def test_an_integer_target_among_many_leaves_a_llama_unchanged():
    model = tiny_llama()
    layer = model.model.layers[1].mlp.down_proj
    layer.weight = nn.Parameter(layer.weight.data.to(torch.int8), requires_grad=False)
    with refused(model, r"model\.layers\.1\.mlp\.down_proj"):
        get_peft_model(model, SPPConfig())


@pytest.mark.parametrize("first", [True, False], ids=["first", "second"])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is empty or has a dot"),
        ("v1.0", "'v1.0' is empty or has a dot"),
        ("keys", r"'keys' is also the name of an attribute of `torch\.nn\.ModuleDict`"),
        ("training", r"'training' is also the name of an attribute"),
        ("weight", "'weight' is also the name of a parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained")
def test_a_name_that_an_adapter_cannot_have_is_refused(name, message, first):
    config = SPPConfig(r=2, target_modules=["q_proj"])
    model = tiny_llama() if first else get_peft_model(tiny_llama(), config)
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=rf"The adapter name {message}.*Choose another name"):
        get_peft_model(model, config, adapter_name=name) if first else model.add_adapter(name, config)
    assert dict(model.named_modules()) == before
    assert first or list(model.peft_config) == ["default"]
