# SPDX-License-Identifier: Apache-2.0
import json
from importlib.util import find_spec

import pytest
import torch
from typer.testing import CliRunner

from benchmarks.kernels_aot import TOKENS, app, instructions_in_loop, widths


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernels_are_compiled_and_what_they_take_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    path = tmp_path / "results" / "kernels_aot.json"
    outcome = CliRunner().invoke(app, ["--quick", "--output", str(path)])
    assert outcome.exit_code == 0, outcome.output
    content = json.loads(path.read_text())
    assert content["settings"]["speed"] == "not measured"
    expected = ["expand", *(f"{tokens} tokens" for tokens in TOKENS[torch.bfloat16])]
    assert [case["kernel"] for case in content["cases"]] == expected
    for case in content["cases"]:
        assert case["registers"] > 0 and case["instructions_per_element"] > 1 and case["loads_by_bytes"]
    assert "| expand, 0 adapters" in outcome.output


def test_loads_and_stores_are_counted_by_their_bytes():
    ptx = """
    ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
    @%p1 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    @%p2 ld.global.b16 { %rs2 }, [ %rd3 + 0 ];
    ld.param.b64 %rd1, [kernel_param_0];
    ld.shared.b32 %r5, [%r6];
    cp.async.cg.shared.global [ %r7 + 0 ], [ %rd4 + 0 ], 0x10, %r8;
    st.global.v2.b64 [ %rd5 + 0 ], { %rd6, %rd7 };
    """
    assert widths(ptx) == ({"2": 2, "16": 2}, {"16": 1})


def test_the_instructions_of_the_longest_loop_are_counted():
    sass = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @!P0 LDG.E.U16 R2, [R4.64] ;
        /*0020*/                   FFMA R3, R2, R5, R3 ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_2) ;
.L_x_2:
        /*0050*/                   EXIT ;
    """
    assert instructions_in_loop(sass) == 3
