# SPDX-License-Identifier: Apache-2.0
"""An adapter that is loaded into a model which has other names for the same modules: its record follows it."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.checkpoints.names import paired_by_ends

from helpers.tiny import LLAMA, prune_, randomize, tiny, tiny_llama


def body(seed):
    return pruned(tiny("LlamaModel", **LLAMA), seed)


def whole(seed):
    return pruned(tiny_llama(), seed)


def pruned(model, seed):
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "q_proj" in name or (".net." in f".{name}" and weight.dim() == 2):
            prune_(weight, "0.5")
    return model


class Named(nn.Module):
    """Two layers under a name."""

    def __init__(self, name):
        super().__init__()
        self.add_module(name, nn.ModuleDict({"net": nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))}))


@pytest.mark.parametrize("first, second", [(body, whole), (whole, body)])
def test_an_adapter_of_the_body_is_compared_in_a_model_with_a_head(tmp_path, first, second):
    model = get_peft_model(first(1), SPPConfig(r=4, target_modules=["q_proj"], check_base="error"))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    other = second(2)
    with pytest.raises(ValueError, match=r"different masks, in 3 of 3 modules: .*layers\.0\.self_attn\.q_proj"):
        other.load_adapter(tmp_path / "adapter")
    same = second(1)
    same.load_adapter(tmp_path / "adapter")
    same.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="different masks"):
        second(2).load_adapter(tmp_path / "again")
    second(1).load_adapter(tmp_path / "again")


def test_key_mapping(tmp_path):
    model = get_peft_model(pruned(Named("old"), 1), SPPConfig(r=4, target_modules=["0", "2"]))
    randomize(model)
    model.save_pretrained(tmp_path / "adapter")
    arguments = {"key_mapping": {"^old": "new"}, "check_base": "error"}
    with pytest.raises(ValueError, match=r"different masks, in 2 of 2 modules: new\.net\.0"):
        PeftModel.from_pretrained(pruned(Named("new"), 2), tmp_path / "adapter", **arguments)
    loaded = PeftModel.from_pretrained(pruned(Named("new"), 1), tmp_path / "adapter", **arguments)
    assert loaded.base_model.relate_base() == {"new.net.0": "same", "new.net.2": "same"}
    loaded.save_pretrained(tmp_path / "again")
    PeftModel.from_pretrained(pruned(Named("new"), 1), tmp_path / "again", check_base="error")


@pytest.mark.parametrize(
    "old, new, pairs",
    [
        (["a.b", "a.c"], ["a.b", "a.c"], {"a.b": "a.b", "a.c": "a.c"}),
        (["layers.0.q", "layers.1.q"], ["m.layers.0.q", "m.layers.1.q"], None),
        # both towers have such layers: the longest ends are taken first
        (["text.m.l.0.q", "vision.l.0.q"], ["m.text.l.0.q", "m.vision.l.0.q"], None),
        (["x.q", "y.q"], ["z.q"], {}),
        (["x.q"], ["y.k"], {}),
        (["q"], ["m.q"], {"q": "m.q"}),
        ([], ["q"], {}),
    ],
)
def test_names_are_paired_by_their_longest_common_ends(old, new, pairs):
    assert paired_by_ends(old, new) == (dict(zip(old, new, strict=True)) if pairs is None else pairs)
