# SPDX-License-Identifier: Apache-2.0
"""What is built for PyPI: its metadata, its files, and that it works where it is installed."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from peft_spp import __version__


ROOT = Path(__file__).parents[2]
# one that forgets the module search path of this process, as a user has it
ISOLATED = (sys.executable, "-P")


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def kept_files() -> list[Path]:
    """What is under version control, and what is new and not ignored."""
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    return [ROOT / name for name in files if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source distribution, and a wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source") / "repository"
    # from a copy of what is under version control: a build leaves files next to its sources
    for file in kept_files():
        if not file.is_relative_to(ROOT / "benchmarks" / "results"):
            kept = copy / file.relative_to(ROOT)
            kept.parent.mkdir(parents=True, exist_ok=True)
            kept.write_bytes(file.read_bytes())
    run(*ISOLATED, "-m", "build", "--outdir", folder, copy, cwd=copy)
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (file,) = distributions.glob("*.whl")
    return file


def test_the_repository_holds_no_file_of_a_megabyte() -> None:
    """Packages that were downloaded on the way have been committed once."""
    assert not [file.name for file in kept_files() if file.stat().st_size > 1_000_000]


def test_the_metadata_is_what_pypi_takes(distributions: Path) -> None:
    run(sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir())


def test_the_wheel_has_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    metadata = {name for name in names if name.startswith(f"peft_spp-{__version__}.dist-info/")}
    native = "peft_spp/native"
    assert {"peft_spp/py.typed", f"{native}/native.cpp", f"{native}/bitmask_avx2.cpp", f"{native}/bitmask.h"} < names
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    sources = {
        path.relative_to(ROOT).as_posix()
        for kind in ("*.py", "*.cpp", "*.h")
        for path in (ROOT / "peft_spp").rglob(kind)
    }
    assert names - metadata == sources | {"peft_spp/py.typed", "peft_spp_command.py"}


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        metadata = Parser().parsestr(archive.read(f"peft_spp-{__version__}.dist-info/METADATA").decode())
    assert metadata["Version"] == __version__ and metadata["License-Expression"] == "Apache-2.0"
    assert "Typing :: Typed" in metadata.get_all("Classifier", [])


def test_the_installed_wheel_registers_the_method_and_its_command_runs(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    venv.create(environment, system_site_packages=True, with_pip=False)
    python = environment / "bin" / "python"
    # the environment that the tests run in, whose packages it is to find, may be a virtual one itself
    packages = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (own,) = environment.glob("lib/python*/site-packages")
    (own / "outer.pth").write_text(f"{packages}\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    where = "import peft_spp, peft; assert peft.PeftType.SPP; print(peft_spp.__file__, peft_spp.SPPConfig(r=4).r)"
    file, r = run(python, "-P", "-c", where, cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}).split()
    assert Path(file).is_relative_to(environment) and r == "4"
    command = environment / "bin" / "peft-spp"
    assert run(command, "--version", cwd=tmp_path, env={"PATH": "/usr/bin:/bin"}).split() == ["peft-spp", __version__]
    assert "merge" in run(command, "--help", cwd=tmp_path, env={"PATH": "/usr/bin:/bin"})
