"""The temporal attention kernels: against float64, in torch's compiler, and through Triton's for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests import temporal_kernel_support as support

pytest.importorskip("triton", reason="Triton has no wheel for this platform")

# The interpreter cuts bfloat16 off where the hardware rounds it: twice the error.
BOUNDS = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    """Output of tests/temporal_kernel_support.py: the kernels in Triton's interpreter, in a process of their own."""
    run = subprocess.run(
        [sys.executable, support.__file__],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", support.CASES)
def test_equals_brute_force(interpreted: dict[str, Any], name: str) -> None:
    assert max(interpreted["distances"][name]) < BOUNDS[support.CASES[name].dtype]


def test_offsets_beyond_32_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["far_apart"] < BOUNDS[torch.float16]


def test_operator_is_sound(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["operator_checks"].values()) == {"SUCCESS"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", support.CASES)
def test_equals_brute_force_on_cuda(name: str) -> None:
    case = support.CASES[name]
    assert max(support.distances(case, "cuda")) < BOUNDS[case.dtype]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_equals_eager_on_cuda() -> None:
    from benchmarks.candidates.temporal_kernel import packed_temporal_attention

    qkv = torch.randn(2, 16, 9, 3 * 144, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    results = []
    for function in (packed_temporal_attention, torch.compile(packed_temporal_attention, fullgraph=True)):
        out = function(qkv, 2)
        results += [(out, *torch.autograd.grad(out.float().square().sum(), qkv))]
    for eager, compiled in zip(*results):
        assert torch.equal(eager, compiled)
