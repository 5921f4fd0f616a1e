# SPDX-License-Identifier: Apache-2.0
"""Fuzz the loaders with Atheris, guided by coverage.

    pip install atheris
    python -m tests.fuzz config header index --runs 100000

It starts from valid files and from the corpus in `tests/fuzz/corpus`, and prints the numbers of executions as JSON. An
input that makes a loader fail is left in the current folder as `crash-...`; move it into the corpus, which pytest
replays, and mend the loader.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).parent
NAMES = ("config", "header", "index", "adapter", "mask_record", "compressed", "old_compressed")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", choices=NAMES, default=NAMES)
    parser.add_argument("--runs", type=int, default=100_000, help="executions of each target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that reach new code")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.in_this_process:
        fuzz(args.targets[0], args.runs, args.seed, args.keep)
        return 0
    results = {}
    for target in args.targets:
        command = [sys.executable, "-m", "tests.fuzz", target, "--in-this-process"]
        command += ["--runs", str(args.runs), "--seed", str(args.seed)]
        command += ["--keep", str(args.keep / target)] if args.keep else []
        done = subprocess.run(command, cwd=HERE.parents[1], stderr=subprocess.PIPE, text=True)
        executions = re.search(r"Done (\d+) runs in (\d+) second", done.stderr)
        if done.returncode or executions is None:
            print(done.stderr[-5000:], file=sys.stderr)
            return 1
        features = re.findall(r"cov: (\d+) ft: (\d+)", done.stderr)[-1]
        results[target] = {
            "executions": int(executions[1]),
            "seconds": int(executions[2]),
            "edges": int(features[0]),
            "features": int(features[1]),
        }
    print(json.dumps(results, indent=1))
    return 0


def fuzz(target: str, runs: int, seed: int, keep: Path | None) -> None:
    """Fuzz one target, and end the process."""
    import atheris

    with atheris.instrument_imports(include=["peft_spp", "peft.config"]):
        from .fuzz_targets import TARGETS, seeds

    from .mutations import mutate

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        mutated = mutate(target, data, seed)
        return mutated if mutated and len(mutated) <= max_size else atheris.Mutate(data, max_size)

    def one_input(data: bytes) -> None:
        try:
            TARGETS[target](data)
        except BaseException:
            Path(f"crash-{target}-{hashlib.sha256(data).hexdigest()[:16]}").write_bytes(data)
            raise

    with tempfile.TemporaryDirectory() as temporary:
        corpus = keep or Path(temporary)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, data in enumerate(seeds()[target]):
            Path(corpus, f"seed-{number}").write_bytes(data)
        flags = [f"-runs={runs}", f"-seed={seed}", "-max_len=8192", "-timeout=10", "-rss_limit_mb=4096"]
        known = HERE / "corpus" / target
        folders = [str(corpus), *([str(known)] if known.is_dir() else [])]
        atheris.Setup([sys.argv[0], *flags, *folders], one_input, custom_mutator=mutator)
        atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
