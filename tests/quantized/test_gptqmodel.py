# SPDX-License-Identifier: Apache-2.0
"""GPT-QModel's layers, through the backend that asks a layer what it does: `pip install gptqmodel`."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_spp import SPPConfig
from peft_spp.tuner.quantized import QuantizedLinear, dequantized_weight

from helpers import reference
from helpers.quantized_cases import IN, OUT, OneLayer, pruned_linear
from helpers.tiny import randomize


torch_layers = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
pytestmark = pytest.mark.slow

GROUP = 32


@pytest.fixture(params=[False, True], ids=["without bias", "with bias"])
def layer(request):
    """A 2:4 pruned layer in the format of GPTQ: 4 bits, groups of 32, a code for zero; and where it is zero."""
    linear = pruned_linear(bias=request.param).half()
    groups = linear.weight.detach().float().view(OUT, IN // GROUP, GROUP)
    scales = (groups.abs().amax(2) / 7).half()
    codes = (groups / scales[:, :, None]).round()
    linear.weight.data = (codes * scales[:, :, None]).view(OUT, IN).half()
    quantized = torch_layers.TorchLinear(
        bits=4, group_size=GROUP, sym=True, desc_act=False, in_features=IN, out_features=OUT, bias=request.param
    )
    index = torch.arange(IN, dtype=torch.int32) // GROUP
    quantized.pack(linear, scales, torch.full_like(scales, 8), index)
    quantized.post_init()
    return quantized.eval(), linear.weight == 0


def test_the_adapted_layer_is_the_formula_trains_and_merges_into_a_plain_one_with_its_zeros(layer):
    quantized, pruned = layer
    model = get_peft_model(OneLayer(quantized), SPPConfig(r=5, target_modules=["lin"]))
    randomize(model)
    adapted = model.base_model.model.lin
    assert type(adapted) is QuantizedLinear and adapted.quantization.startswith("gptqmodel ")
    weight, factors = dequantized_weight(adapted.get_base_layer()), adapted.get_factors(["default"])
    assert (weight[pruned] == 0).all() and weight[~pruned].count_nonzero() > 0.8 * (~pruned).sum()
    x = torch.randn(3, IN).half().requires_grad_()
    y, expected = model(x), reference.linear(x, weight, quantized.bias, factors)
    # twice the rounding of float16: of the weight and of the result
    assert (y.double() - expected.double()).norm() < 2**-10 * expected.double().norm()

    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=0.1)
    losses = []
    for _ in range(5):
        losses.append(model(x.detach()).float().square().mean())
        losses[-1].backward()
        assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]

    trained = model(x.detach())
    with pytest.raises(ValueError, match="cannot be quantized again"):
        model.merge_adapter()
    merged = model.merge_and_unload(dequantize=True).lin
    assert type(merged) is nn.Linear and (merged.weight[pruned] == 0).all()
    torch.testing.assert_close(merged(x.detach()), trained, rtol=1e-2, atol=1e-2)
