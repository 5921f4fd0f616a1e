# SPDX-License-Identifier: Apache-2.0
import os

from hypothesis import Phase, settings


# nothing in the tests may reach for a model hub
os.environ["HF_HUB_OFFLINE"] = "1"

# for the slow run of the property tests, and for mutation testing, where a failure alone counts
settings.register_profile("thorough", max_examples=2000)
settings.register_profile("mutation", phases=[Phase.explicit, Phase.generate], derandomize=True, database=None)
