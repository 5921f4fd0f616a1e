# SPDX-License-Identifier: Apache-2.0
"""Base layers whose weight is no parameter, because PyTorch's pruning or a parametrization computes it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from peft_spp import SPPConfig
from peft_spp.sparsity import compare_sparsity, sparsity_report
from peft_spp.tuner.base_record import relate_base
from peft_spp.tuner.param_wrapper import ParamWrapper

from helpers import reference
from helpers.tiny import MLP, randomize


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


class Property(nn.Linear):
    """A layer that computes its weight by itself."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.raw = nn.Parameter(self._parameters.pop("weight").detach().clone())

    @property
    def weight(self):
        return self.raw.tanh()


def magnitude(layer: nn.Module) -> None:
    prune.l1_unstructured(layer, "weight", amount=0.5)


def twice(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", amount=0.3)
    prune.ln_structured(layer, "weight", amount=2, n=2, dim=0)


# what computes a weight, what the message names, and how the weight becomes a parameter
COMPUTED = {
    "prune": (magnitude, r"prune\.remove", lambda layer: prune.remove(layer, "weight")),
    "prune-twice": (twice, r"prune\.remove", lambda layer: prune.remove(layer, "weight")),
    "weight_norm": (nn.utils.weight_norm, "remove_weight_norm", nn.utils.remove_weight_norm),
    "spectral_norm": (nn.utils.spectral_norm, "remove_spectral_norm", nn.utils.remove_spectral_norm),
    "new-weight_norm": (
        parametrizations.weight_norm,
        "remove_parametrizations",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "new-spectral_norm": (
        parametrizations.spectral_norm,
        "remove_parametrizations",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
    "parametrization": (
        lambda layer: parametrize.register_parametrization(layer, "weight", Half()),
        "remove_parametrizations",
        lambda layer: parametrize.remove_parametrizations(layer, "weight"),
    ),
}
WAYS = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "safe_merge": lambda model: model.merge_and_unload(safe_merge=True),
    "merge_adapter": lambda model: model.merge_adapter(),
    "safe_merge_adapter": lambda model: model.merge_adapter(safe_merge=True),
    "layer": lambda model: model.base_model.model.lin1.merge(),
}
X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def adapted(kind: str, after: bool = False, **settings):
    torch.manual_seed(0)
    base = MLP().double().eval()
    # the second layer, so that the first has been merged where a check comes too late
    if not after:
        COMPUTED[kind][0](base.lin1)
    base(X)
    model = get_peft_model(base, SPPConfig(**{"r": 3, "target_modules": ["lin0", "lin1"], **settings})).double()
    randomize(model)
    if after:
        COMPUTED[kind][0](model.base_model.model.lin1.get_base_layer())
    return model.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("kind", list(COMPUTED))
def test_merging_is_refused_by_name_with_the_remedy(kind, way, after):
    model = adapted(kind, after)
    output, before = model(X), state(model)
    with pytest.raises(ValueError, match=rf"'lin1'.*{COMPUTED[kind][1]}"):
        WAYS[way](model)
    after_call = state(model)
    assert before.keys() == after_call.keys() and all(torch.equal(before[key], after_call[key]) for key in before)
    assert torch.equal(model(X), output)
    # the remedy works
    COMPUTED[kind][2](model.base_model.model.lin1.get_base_layer())
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(X), output)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", list(COMPUTED))
def test_the_adapter_works_on_the_weight_that_is_computed(kind):
    model = adapted(kind)
    model(X)
    layer = model.base_model.model.lin1
    weight = layer.get_base_layer().weight.detach()
    hidden = nn.functional.relu(model.base_model.model.lin0(X))
    expected = reference.linear(hidden, weight, layer.get_base_layer().bias, layer.get_factors(["default"]))
    torch.testing.assert_close(model(X), expected)
    model(X).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in model.named_parameters() if "spp_" in name)


def test_the_record_has_the_masks_of_pytorchs_pruning():
    model = adapted("prune")
    assert set(model.peft_config["default"].base_record.masks) == {"lin0", "lin1"}
    other = adapted("prune")
    with torch.no_grad():
        mask = other.base_model.model.lin1.get_base_layer().weight_mask
        mask.copy_(mask.flip(0))
    other.base_model.model(X)
    assert relate_base(model.peft_config["default"].base_record, other.base_model.model, "default") == {
        "lin0": "same",
        "lin1": "different",
    }
    relations = model.base_model.relate_base()
    assert set(relations.values()) == {"same"}
    prune.remove(model.base_model.model.lin1.get_base_layer(), "weight")
    assert set(model.base_model.relate_base().values()) == {"same"}


def test_pytorchs_pruning_from_the_first_line_to_the_merged_model():
    """What a reader who knows `torch.nn.utils.prune` does."""
    torch.manual_seed(0)
    base = MLP()
    for layer in (base.lin0, base.lin1):
        prune.l1_unstructured(layer, "weight", amount=0.5)
    pruned = {name: (getattr(base, name).weight == 0) for name in ("lin0", "lin1")}
    model = get_peft_model(base, SPPConfig(r=2, target_modules=["lin0", "lin1"]))
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        model(torch.randn(8, 12)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = torch.randn(4, 12)
    output = model(x)
    for layer in (base.lin0, base.lin1):
        prune.remove(layer.get_base_layer(), "weight")
    merged = model.merge_and_unload(safe_merge=True)
    torch.testing.assert_close(merged(x), output)
    assert all((getattr(merged, name).weight[mask] == 0).all() for name, mask in pruned.items())


def test_a_class_that_computes_its_weight_is_named():
    base = nn.ModuleDict({"lin": Property(6, 4)})
    base.forward = lambda x: base["lin"](x)
    model = get_peft_model(base, SPPConfig(r=2, target_modules=["lin"], init_weights=False))
    with pytest.raises(ValueError, match=r"'lin'.*the class Property.*parameter"):
        model.merge_and_unload()


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", list(COMPUTED))
def test_a_weight_that_is_computed_once_it_is_merged_cannot_be_unmerged(kind):
    torch.manual_seed(0)
    model = adapted(kind, after=False, target_modules=["lin0"])
    model.merge_adapter()
    COMPUTED[kind][0](model.base_model.model.lin0.get_base_layer())
    with pytest.raises(ValueError, match=rf"'lin0'.*{COMPUTED[kind][1]}") as raised:
        model.unmerge_adapter()
    assert "FSDP" not in str(raised.value)


@pytest.mark.parametrize("kind", ["prune", "parametrization", "weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_target_parameters_follow_the_same_rule(kind):
    model = adapted(kind, target_modules=[], target_parameters=["lin0.weight"])
    layer = model.base_model.model.lin0
    assert isinstance(layer, ParamWrapper)
    COMPUTED[kind][0](layer.get_base_layer())
    for way in ("merge_and_unload", "merge_adapter"):
        with pytest.raises(ValueError, match=rf"'lin0\.weight'.*{COMPUTED[kind][1]}"):
            WAYS[way](model)


def test_a_layer_without_the_adapter_that_is_merged_may_be_computed():
    model = adapted("prune", target_modules=["lin0"])
    model.add_adapter("other", SPPConfig(r=2, target_modules=["lin1"]))
    model.merge_adapter(adapter_names=["default"])
    with pytest.warns(UserWarning, match="Already unmerged"):  # of lin1
        model.unmerge_adapter()
    with pytest.raises(ValueError, match="'lin1'"):
        model.merge_adapter(adapter_names=["other"])


def test_reports_read_what_pruning_computes():
    base = MLP()
    prune.l1_unstructured(base.lin0, "weight", amount=0.5)
    assert sparsity_report(base)["lin0"].zeros == 120
    assert compare_sparsity(base, base).kept
