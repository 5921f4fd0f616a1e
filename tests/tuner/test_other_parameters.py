# SPDX-License-Identifier: Apache-2.0
"""SPP on parameters that are neither in linear layers nor experts, by `target_parameters`."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner import ParamWrapper

from helpers.tiny import is_positive_zero, randomize


class Others(nn.Module):
    """Parameters of two and three dimensions that are not in linear layers."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.conv = nn.Conv1d(8, 12, 3)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.rnn = nn.GRU(12, 5, batch_first=True)
        self.norm = nn.LayerNorm(5)
        self.image = nn.Conv2d(1, 1, 1)

    def forward(self, ids):
        x = self.conv(self.embedding(ids).transpose(1, 2)).transpose(1, 2)
        x = self.rnn(self.attention(x, x, x)[0])[0]
        return self.image(self.norm(x)[:, None])


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("embedding.weight", ((2, 8), (20, 1))),
        ("conv.weight", ((12 * 2, 3), (12 * 8, 1))),
        ("attention.in_proj_weight", ((2, 12), (36, 1))),
        ("rnn.weight_ih_l0", ((2, 12), (15, 1))),
    ],
)
@pytest.mark.parametrize("train", [False, True])
def test_what_parameters_it_reaches_beyond_experts(name, shapes, train):
    """docs/mixtures.md lists them."""
    torch.manual_seed(0)
    base = Others().train(train)
    weight = base.get_parameter(name)
    with torch.no_grad():
        weight[torch.rand(weight.shape) < 0.5] = 0
    zeros, ids = weight == 0, torch.arange(18).view(2, 9)
    before = base(ids)
    model = get_peft_model(base, SPPConfig(r=2, target_modules=[], target_parameters=[name])).train(train)
    randomize(model)
    (wrapper,) = (module for module in model.modules() if isinstance(module, ParamWrapper))
    assert (wrapper.spp_A["default"].weight.shape, wrapper.spp_B["default"].weight.shape) == shapes
    after = model(ids)
    after.sum().backward()
    assert wrapper.spp_B["default"].weight.grad.abs().max() > 0
    assert not torch.allclose(after, before)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(ids), after)
    assert is_positive_zero(merged.get_parameter(name)[zeros]).all()


@pytest.mark.parametrize("name", ["norm.weight", "image.weight"])
def test_parameters_of_other_dimensions_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}.*two dimensions"):
        get_peft_model(Others(), SPPConfig(r=2, target_modules=[], target_parameters=[name]))
