# SPDX-License-Identifier: Apache-2.0
"""What a user does with the Hub: run as a script, since `huggingface_hub` reads where the Hub is when it is imported.

argv: a folder for the results. The environment names the Hub and has no token; where one is needed it is passed.
"""

import json
import sys
from pathlib import Path

import torch
from hub_server import TOKEN
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import peft_spp
from peft_spp import SPPConfig
from peft_spp.interchange import export_adapter
from peft_spp.merge import merge_checkpoint

from helpers.tiny import block_linears, prune_, randomize, tiny_llama


IDS = torch.arange(10).view(1, 10)
out = Path(sys.argv[1])
results: dict[str, object] = {}


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def refused(call):
    """The name of the error that a call ends in."""
    try:
        call()
    except (OSError, ValueError) as error:
        return type(error).__name__
    return None


def base():
    return AutoModelForCausalLM.from_pretrained("someone/base")


model = tiny_llama()
for layer in block_linears(model).values():
    prune_(layer.weight, "2:4")
results["without a token"] = refused(lambda: model.push_to_hub("someone/base"))
model.push_to_hub("someone/base", token=TOKEN)

# PEFT's own way, to two revisions of a public repository
model = get_peft_model(base(), SPPConfig(r=4, task_type="CAUSAL_LM"))
randomize(model)
first = logits(model)
model.push_to_hub("someone/adapter", token=TOKEN)
results["PeftModel"] = torch.equal(logits(PeftModel.from_pretrained(base(), "someone/adapter")), first)
results["AutoPeftModel"] = torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("someone/adapter")), first)
randomize(model, scale=0.3)
second = logits(model)
model.push_to_hub("someone/adapter", token=TOKEN, revision="v2")
results["changed"] = not torch.allclose(first, second)
results["main"] = torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained("someone/adapter")), first)
with_revision = PeftModel.from_pretrained(base(), "someone/adapter", revision="v2")
results["revision"] = torch.equal(logits(with_revision), second)
results["unknown revision"] = refused(lambda: PeftModel.from_pretrained(base(), "someone/adapter", revision="v3"))
plain = base()
plain.load_adapter("someone/adapter")
results["load_adapter"] = torch.equal(logits(plain), first)
peft_spp.hotswap_adapter(with_revision, "someone/adapter", "default")
results["hotswap"] = torch.equal(logits(with_revision), first)

# ours, with the card, to a private repository
peft_spp.push_to_hub(model, "someone/private", token=TOKEN, private=True)
results["private"] = refused(lambda: PeftModel.from_pretrained(base(), "someone/private"))
loaded = PeftModel.from_pretrained(base(), "someone/private", token=TOKEN)
results["token"] = torch.equal(logits(loaded), second)
card = ModelCard.load("someone/private", token=TOKEN)
card.text += "\nWritten by hand.\n"
card.push_to_hub("someone/private", token=TOKEN)
larger = get_peft_model(base(), SPPConfig(r=7, task_type="CAUSAL_LM"))
randomize(larger)
peft_spp.push_to_hub(larger, "someone/private", token=TOKEN, revision="r7")
loaded = AutoPeftModelForCausalLM.from_pretrained("someone/private", token=TOKEN, revision="r7")
results["token and revision"] = torch.equal(logits(loaded), logits(larger))

# a card that cannot be read stays
api = HfApi(token=TOKEN)
api.create_repo("someone/odd")
card_text = b"---\nlicense: mit\nmodel-index: 5\n---\nWritten by hand.\n"
api.upload_file(path_or_fileobj=card_text, path_in_repo="README.md", repo_id="someone/odd")
peft_spp.push_to_hub(model, "someone/odd", token=TOKEN)
kept = Path(api.hf_hub_download("someone/odd", "README.md")).read_bytes() == card_text
results["odd card"] = kept and "adapter_model.safetensors" in api.list_repo_files("someone/odd")
results["not the main process"] = refused(
    lambda: peft_spp.push_to_hub(model, "someone/nobody", token=TOKEN, is_main_process=False)
)

# an adapter with a name lies in a folder of its own
named = get_peft_model(base(), SPPConfig(r=4, task_type="CAUSAL_LM"), adapter_name="mine")
randomize(named)
peft_spp.push_to_hub(named, "someone/named", token=TOKEN)
loaded = PeftModel.from_pretrained(base(), "someone/named", subfolder="mine")
results["subfolder"] = torch.equal(logits(loaded), logits(named))

# a base model that is a folder here, and means nothing on the Hub
base().save_pretrained(out / "base")
local = get_peft_model(AutoModelForCausalLM.from_pretrained(out / "base"), SPPConfig(r=4, task_type="CAUSAL_LM"))
peft_spp.push_to_hub(local, "someone/local", token=TOKEN)
results["local files"] = sorted(HfApi(token=TOKEN).list_repo_files("someone/local"))

# the tools take the id of a repository
merge_checkpoint(None, "someone/adapter", out / "merged")
merged = AutoModelForCausalLM.from_pretrained(out / "merged")
results["merge"] = torch.allclose(logits(merged), first, atol=1e-5)
export_adapter("someone/adapter", out / "hira")
exported = PeftModel.from_pretrained(base(), out / "hira")
results["export"] = torch.allclose(logits(exported), first, atol=1e-5)

(out / "results.json").write_text(json.dumps(results))
