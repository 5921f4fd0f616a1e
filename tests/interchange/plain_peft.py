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
    model = PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=dtype != "float64").eval()
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        unmerged = model(input_ids=ids).logits
        logits.append((unmerged, model.merge_and_unload()(input_ids=ids).logits))
assert "peft_spp" not in sys.modules
torch.save(logits, sys.argv[2])
