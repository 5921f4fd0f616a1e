# SPDX-License-Identifier: Apache-2.0
"""`peft-spp sft` as a module: `accelerate launch -m peft_spp.sft ...`."""

import sys

from ..cli import app


app(args=["sft", *sys.argv[1:]], prog_name="peft-spp")
