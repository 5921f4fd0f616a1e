# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.kernels_gpu import app


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_cuda_device_it_says_so_and_writes_nothing(tmp_path):
    result = CliRunner().invoke(app, ["--quick", "--output-dir", str(tmp_path)])
    assert result.exit_code == 2
    assert "CUDA device" in result.output
    assert not list(tmp_path.iterdir())
