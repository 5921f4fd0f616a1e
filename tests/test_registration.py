# SPDX-License-Identifier: Apache-2.0
import copy
import importlib
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import peft
import pytest
from peft import PeftType
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)

import peft_spp
from peft_spp.peft_version import check_peft
from peft_spp.registration import register


ENUM_EXTENSION = Path(peft_spp.__file__).parent / "enum_extension.py"

# Self-contained, so that any Python can run it; argv[1] is the file of the extension.
ENUM_CHECK = """
import copy, enum, importlib.util, json, pickle, sys
spec = importlib.util.spec_from_file_location("enum_extension", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)

class Kind(str, enum.Enum):
    LORA = "LORA"
    IA3 = "IA3"

sys.modules["__main__"].Kind = Kind
member = module.extend_str_enum(Kind, "SPP")
assert Kind.SPP is Kind("SPP") is Kind["SPP"] is member
assert [k.name for k in Kind] == ["LORA", "IA3", "SPP"] == list(Kind.__members__)
assert [k.value for k in reversed(Kind)] == ["SPP", "IA3", "LORA"]
assert len(Kind) == 3 and member in Kind and "SPP" in list(Kind)
assert isinstance(member, Kind) and isinstance(member, str) and member == "SPP"
assert str(member) == "Kind.SPP" and repr(member) == "<Kind.SPP: 'SPP'>"
assert format(member, "") == format(Kind.LORA, "").replace("LORA", "SPP")
assert member.name == "SPP" and member.value == "SPP" and "SPP" in dir(Kind)
assert {Kind.LORA: 1, member: 2}[Kind("SPP")] == 2
assert json.loads(json.dumps({"t": member}))["t"] == "SPP" and Kind(json.loads(json.dumps(member))) is member
for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    assert pickle.loads(pickle.dumps(member, protocol)) is member
assert copy.copy(member) is member and copy.deepcopy([member])[0] is member
if sys.version_info >= (3, 12):
    assert "SPP" in Kind and "NOPE" not in Kind
for bad in ("NOPE", "spp"):
    try:
        Kind(bad)
    except ValueError:
        pass
    else:
        raise AssertionError(bad)
try:
    Kind.SPP = 1
except AttributeError:
    pass
else:
    raise AssertionError("a member was reassigned")
"""


@pytest.mark.parametrize("python", ["python3.11", "python3.12", "python3.13", "python3.14"])
def test_the_new_member_is_like_any_other(python):
    executable = sys.executable if python == f"python3.{sys.version_info.minor}" else shutil.which(python)
    works = executable and subprocess.run([executable, "-c", ""], capture_output=True).returncode == 0
    if not works:
        pytest.skip(f"{python} is not installed")
    subprocess.run([executable, "-c", ENUM_CHECK, str(ENUM_EXTENSION)], check=True)


def test_the_method_is_in_every_table_of_peft():
    assert PeftType.SPP is PeftType("SPP") and PeftType.SPP in list(PeftType)
    assert str(PeftType.SPP) == "PeftType.SPP"
    for key in (PeftType.SPP, "SPP"):
        assert PEFT_TYPE_TO_CONFIG_MAPPING[key] is peft_spp.SPPConfig
        assert PEFT_TYPE_TO_TUNER_MAPPING[key] is peft_spp.SPPModel
        assert PEFT_TYPE_TO_PREFIX_MAPPING[key] == "spp_"
    assert PeftType.SPP not in PEFT_TYPE_TO_MIXED_MODEL_MAPPING


def test_pickle_and_json_of_a_config():
    config = peft_spp.SPPConfig(target_modules=["a"])
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert pickle.loads(pickle.dumps(config, protocol)) == config
    assert copy.deepcopy(config) == config
    assert json.loads(json.dumps(config.peft_type)) == "SPP"


def test_importing_again_is_a_no_op():
    members, tables = list(PeftType), len(PEFT_TYPE_TO_CONFIG_MAPPING)
    member = PeftType.SPP
    importlib.reload(peft_spp)
    register(peft_spp.SPPConfig, peft_spp.SPPModel)
    assert list(PeftType) == members and len(PEFT_TYPE_TO_CONFIG_MAPPING) == tables and PeftType.SPP is member


@pytest.mark.parametrize("version", ["0.19.1", "0.20.0", "0.21.1"])
def test_an_old_peft_is_named(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.raises(ImportError, match=version.replace(".", r"\.")):
        check_peft()


@pytest.mark.parametrize("version", ["0.21.2", "0.21.3", "0.22.0.dev0", peft.__version__])
def test_a_supported_peft_passes(version, monkeypatch, recwarn):
    monkeypatch.setattr(peft, "__version__", version)
    check_peft()
    assert not recwarn


@pytest.mark.parametrize("version", ["0.22.0", "1.0.0"])
def test_a_newer_peft_is_warned_of_if_it_has_all_that_is_used(version, monkeypatch):
    monkeypatch.setattr(peft, "__version__", version)
    with pytest.warns(UserWarning, match=version.replace(".", r"\.")):
        check_peft()
    monkeypatch.delattr("peft.tuners.tuners_utils._ExcludedModule")
    monkeypatch.delattr("peft.tuners.tuners_utils.BaseTuner._inject_parameters")
    with pytest.raises(ImportError, match=r"lacks .*BaseTuner\._inject_parameters, .*_ExcludedModule\. Run `pip"):
        check_peft()


IMPORT_IS_REFUSED = """
try:
    import peft_spp
except ImportError as error:
    print(error)
else:
    sys.exit("not refused")
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_a_peft_that_has_spp_itself_is_left_alone():
    result = run(
        "import importlib.util, sys, peft\n"
        "from peft.utils.peft_types import PeftType\n"
        f"spec = importlib.util.spec_from_file_location('enum_extension', {str(ENUM_EXTENSION)!r})\n"
        "module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)\n"
        "own = module.extend_str_enum(PeftType, 'SPP')\n"
        "peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[own] = peft.LoraConfig\n"
        "before = list(PeftType)\n"
        + IMPORT_IS_REFUSED
        + "assert list(PeftType) == before and peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING['SPP'] is peft.LoraConfig\n"
    )
    assert result.returncode == 0, result.stderr
    assert "SPP" in result.stdout and peft.__version__ in result.stdout


def test_an_unsupported_peft_leaves_the_enum_alone():
    result = run(
        "import peft, sys\nfrom peft import PeftType\nbefore = list(PeftType)\npeft.__version__ = '0.10.0'\n"
        + IMPORT_IS_REFUSED
        + "assert list(PeftType) == before\n"
    )
    assert result.returncode == 0, result.stderr
    assert "0.10.0" in result.stdout


def test_a_newer_peft_is_told_of_once_and_works():
    result = run(
        "import peft, warnings\npeft.__version__ = '0.99.0'\nimport peft_spp\nimport peft_spp\n"
        "print(peft.PEFT_TYPE_TO_CONFIG_MAPPING['SPP'].__name__)"
    )
    assert result.returncode == 0 and result.stdout == "SPPConfig\n", result.stderr
    assert result.stderr.count("PEFT 0.99.0 is installed") == 1


def test_a_newer_peft_that_lacks_something_is_left_alone():
    result = run(
        "import peft, sys\nfrom peft import PeftType\nbefore = list(PeftType)\npeft.__version__ = '0.99.0'\n"
        "del peft.tuners.tuners_utils._ExcludedModule\n" + IMPORT_IS_REFUSED + "assert list(PeftType) == before\n"
    )
    assert result.returncode == 0, result.stderr
    assert "0.99.0 lacks peft.tuners.tuners_utils._ExcludedModule" in result.stdout


def test_the_mixed_model_refuses_spp_by_name():
    from helpers.tiny import MLP

    with pytest.raises(ValueError, match="SPP"):
        peft.get_peft_model(MLP(), peft_spp.SPPConfig(target_modules=["lin0"]), mixed=True)
