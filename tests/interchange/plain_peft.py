# SPDX-License-Identifier: Apache-2.0
"""Load adapters with plain PEFT: run as a script, without peft_spp.

argv: a JSON list of [class of the base, folder of the base, folder of the adapter, dtype], and a file for the logits
and, for each adapter, for the logits once it is merged.
"""

import json
import sys

import torch
import transformers
from peft import PeftModel


logits = []
for class_name, base, adapter, dtype in json.loads(sys.argv[1]):
    model = getattr(transformers, class_name).from_pretrained(base, dtype=getattr(torch, dtype))
    pruned = {name: parameter == 0 for name, parameter in model.named_parameters()}
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=dtype != "float64").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        model = model.merge_and_unload()
        logits.append((unmerged, model(input_ids=ids).logits))
    for name, parameter in model.named_parameters():
        # a head that was trained is no longer the one of the base model
        assert "score" in name or not parameter[pruned[name]].any(), name
assert "peft_spp" not in sys.modules
torch.save(logits, sys.argv[2])
