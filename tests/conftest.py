# SPDX-License-Identifier: Apache-2.0
import os
import sys
from pathlib import Path


# nothing in the tests may reach for a model hub
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))
