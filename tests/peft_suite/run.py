# SPDX-License-Identifier: Apache-2.0
"""Run PEFT's own tests on SPP.

    python tests/peft_suite/run.py [--peft-tests FOLDER] [--modules NAME ...] [-- PYTEST ARGUMENTS]

The tests come from the source distribution of the installed PEFT version; pip downloads it unless a folder is given.
Nothing is loaded from the Hub: the models are tiny ones written from configurations.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import peft


HERE = Path(__file__).parent
# these take the methods from lists, which the plugin fills with SPP
LISTED = [
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
]
# this one takes the methods from a tuple: SPP is put in it in the source
CONFIGURATION = "test_config"
# these are written for LoRA: SPP is put in LoRA's place in the source
REWRITTEN = ["test_low_level_api", "test_tuners_utils", "test_initialization", "test_target_parameters"]

_REWRITES = [
    (r"\bLoraConfig\b", "SPPConfig"),
    (r"\bLoraModel\b", "SPPModel"),
    (r"\bLoraLayer\b", "SPPLayer"),
    (r"\binit_lora_weights\b", "init_weights"),
    (r"lora_(A|B|alpha|dropout|only|embedding_A|embedding_B)\b", r"spp_\1"),
    (r'"lora\.(Linear|ParamWrapper)\b', r'"spp.\1'),
    (r"(?<!tuners\.)\blora\.ParamWrapper\b", "tuner.ParamWrapper"),
    (r'"LORA"', '"SPP"'),
    (r"PeftType\.LORA\b", "PeftType.SPP"),
    (r'"lora_"', '"spp_"'),
]
_IMPORTS = "from peft_spp import SPPConfig, SPPLayer, SPPModel, tuner\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peft-tests", type=Path, help="the folder `tests` of an unpacked PEFT source distribution")
    parser.add_argument("--modules", nargs="+", default=[*LISTED, CONFIGURATION, *REWRITTEN])
    parser.add_argument("pytest_args", nargs="*")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        source = args.peft_tests.resolve() if args.peft_tests else download_peft_tests(folder)
        # older versions of PEFT have fewer modules of tests
        args.modules = [module for module in args.modules if (source / f"{module}.py").exists()]
        copy_tests(source, folder / "peft_tests", args.modules)
        sys.path.insert(0, str(HERE))
        from tiny_models import write_tiny_models

        write_tiny_models(folder)
        command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", str(folder / "pytest.ini"), *args.pytest_args]
        (folder / "pytest.ini").write_text(
            "[pytest]\nmarkers =\n    single_gpu_tests\n    multi_gpu_tests\n    regression\n"
        )
        paths = [str(HERE), str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
        modules = [str(folder / "peft_tests" / f"{module}.py") for module in args.modules]
        return subprocess.run([*command, *modules], cwd=folder, env=env).returncode


def download_peft_tests(folder: Path) -> Path:
    """Unpack the source distribution of the installed PEFT and return its folder of tests."""
    requirement = f"peft=={peft.__version__}"
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        "peft",
        "--dest",
        str(folder),
    ]
    subprocess.run([*pip, requirement], check=True)
    (archive,) = folder.glob("peft-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("peft-*/tests"))


def copy_tests(source: Path, destination: Path, modules: list[str]) -> None:
    """Copy the test modules and what they import, as a package, with SPP in LoRA's place where that is the way."""
    destination.mkdir()
    (destination / "__init__.py").touch()
    for name in ("testing_common.py", "testing_utils.py"):
        shutil.copy(source / name, destination / name)
    for module in modules:
        text = (source / f"{module}.py").read_text()
        if module == CONFIGURATION:
            text = re.sub(r"(?m)^ALL_CONFIG_CLASSES = \((\n .*)*\n\)", "ALL_CONFIG_CLASSES = ((SPPConfig, {}),)", text)
            text = text.replace("import pytest\n", f"import pytest\n\n{_IMPORTS}", 1)
        if module in REWRITTEN:
            for pattern, replacement in _REWRITES:
                text = re.sub(pattern, replacement, text)
            # where a test counts on LoRA's defaults, say them
            before, rank_tests, after = text.partition("class TestRankAndAlphaPattern")
            after = re.sub(r"SPPConfig\(\s*target_modules", "SPPConfig(r=8, spp_alpha=8, target_modules", after)
            # one row cannot have the eight blocks that are asked for
            text = before + rank_tests + after.replace("nn.Linear(1, 1)", "nn.Linear(32, 32)")
            # SPPConfig and the like are not names of PEFT
            text = re.sub(r"(?m)^    SPPConfig,\n|(?<=^from peft import )SPPConfig, ", "", text)
            text = re.sub(r"(?m)^from peft(\.\S+)? import (SPP\w+(, )?)+$\n", "", text)
            text = re.sub(
                r"(from peft\.tuners\.lora(?:\.\w+)? import )(SPPLayer|SPPModel|ParamWrapper)\b",
                r"from peft_spp.tuner import \2",
                text,
            )
            first_import = re.search(r"(?m)^(from|import) (?!__future__)", text)
            text = text[: first_import.start()] + _IMPORTS + text[first_import.start() :]
        (destination / f"{module}.py").write_text(text)


if __name__ == "__main__":
    sys.exit(main())
