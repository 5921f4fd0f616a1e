# SPDX-License-Identifier: Apache-2.0
"""Adapters on the Hub: the real client against a hub of our own on the loopback interface."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from hub_server import Hub, Repo
from huggingface_hub import ModelCard

from peft_spp.sparsity import compare_sparsity


HERE = Path(__file__).parent


class RoundTrip(NamedTuple):
    repos: dict[str, Repo]
    requests: list[tuple[str, str]]
    results: dict
    folder: Path

    def card(self, repo: str, branch: str = "main") -> ModelCard:
        found = self.repos[repo]
        return ModelCard(found.commits[found.branches[branch]]["README.md"][0].decode())


@pytest.fixture(scope="module")
def round_trip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    with Hub() as hub:
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
        }
        script = HERE / "round_trip.py"
        run = subprocess.run(
            [sys.executable, script, folder], env=environment, capture_output=True, text=True, timeout=300
        )
    assert run.returncode == 0, run.stderr
    results = json.loads((folder / "results.json").read_text())
    return RoundTrip(hub.repos, hub.requests, results, folder)


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel", "load_adapter", "subfolder", "hotswap"])
def test_an_adapter_comes_back_from_the_hub(round_trip, way):
    assert round_trip.results[way] is True


def test_a_revision_is_another_adapter(round_trip):
    assert round_trip.results["changed"] and round_trip.results["main"] and round_trip.results["revision"]
    assert round_trip.results["unknown revision"] is not None


def test_a_token_is_needed_to_write_and_to_read_what_is_private(round_trip):
    assert round_trip.results["without a token"] is not None and round_trip.results["private"] is not None
    assert round_trip.results["token"] and round_trip.results["token and revision"]


def test_the_weights_went_through_lfs(round_trip):
    repo = round_trip.repos["someone/adapter"]
    files = repo.commits[repo.branches["main"]]
    assert files["adapter_model.safetensors"][1] and not files["adapter_config.json"][1]
    assert any(method == "PUT" and path.startswith("/lfs/") for method, path in round_trip.requests)


def test_the_card_has_the_metadata_that_the_hub_reads(round_trip):
    data = round_trip.card("someone/private").data
    assert data.library_name == "peft" and data.base_model == "someone/base"
    assert data["base_model_relation"] == "adapter" and data.pipeline_tag == "text-generation"
    assert {"spp", "sparse", "2:4", "transformers"} <= set(data.tags)


def test_the_card_says_what_a_reader_needs(round_trip):
    text = round_trip.card("someone/private").text
    for fact in ("someone/base", "SPP", "| 4 |", "50.00%", "2:4 in 21 modules", "q_proj"):
        assert fact in text, fact
    for command in ("import peft_spp", 'from_pretrained("someone/private")', "peft-spp merge someone/private"):
        assert command in text, command
    assert "merge_and_unload" in text and "compare_sparsity" in text


def test_a_new_push_updates_our_part_of_the_card_and_keeps_the_rest(round_trip):
    text = round_trip.card("someone/private", "r7").text
    assert "| 7 |" in text and "| 4 |" not in text
    assert text.count("import peft_spp") == 1 and text.count("Written by hand.") == 1


def test_a_card_that_cannot_be_read_stays_and_the_adapter_is_uploaded(round_trip):
    assert round_trip.results["odd card"]


def test_only_the_main_process_uploads(round_trip):
    assert round_trip.results["not the main process"] == "ValueError" and "someone/nobody" not in round_trip.repos


def test_the_card_of_a_named_adapter_says_where_it_lies(round_trip):
    text = round_trip.card("someone/named").text
    assert 'subfolder="mine"' in text and "`mine`" in text
    assert "peft-spp merge" not in text and "merge_and_unload" in text  # the command takes no subfolder


def test_a_base_model_that_is_a_folder_is_not_named_in_the_metadata(round_trip):
    card = round_trip.card("someone/local")
    assert card.data.base_model is None and not any(tag.startswith("base_model") for tag in card.data.tags)
    assert round_trip.results["local files"] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "base_masks.json",
    ]


def test_the_tools_take_the_id_of_a_repository(round_trip):
    assert round_trip.results["merge"] and round_trip.results["export"]
    assert compare_sparsity(round_trip.folder / "base", round_trip.folder / "merged").kept
