"""The temporal attention kernels against brute force in float64, in Triton's interpreter and on a GPU.

The interpreter is chosen at import: this file, run as a program with TRITON_INTERPRET=1, prints its figures as JSON.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no wheel for this platform")
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.candidates import temporal_kernel as kernels
from tests.latte_support import brute_force, relative_error

# The interpreter cuts bfloat16 off where the hardware rounds it: twice the error.
BOUNDS = {torch.float32: 5e-7, torch.float16: 1e-3, torch.bfloat16: 8e-3}
on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Case(NamedTuple):
    """A clip of `frames` and `images`, of which the kernel sees the frames: its tensors are strided views."""

    batch: int
    frames: int
    images: int
    tokens: int
    heads: int
    head_width: int
    dtype: torch.dtype = torch.float32
    packed: bool = True


CASES = {
    "XL/2": Case(2, 16, 0, 3, 2, 72),
    "XL/2 bfloat16": Case(2, 16, 0, 3, 2, 72, torch.bfloat16),
    "odd frames, images": Case(2, 5, 3, 3, 1, 40),
    "one frame": Case(3, 1, 0, 3, 1, 16),
    "one token": Case(1, 3, 0, 1, 2, 8),
    "long clip": Case(1, 32, 0, 1, 1, 72),
    "parallel": Case(1, 17, 2, 1, 2, 144),
    "rotated": Case(2, 16, 2, 3, 2, 72, packed=False),
    "rotated bfloat16": Case(1, 16, 2, 3, 2, 72, torch.bfloat16, packed=False),
}


def attention(qkv: Tensor, num_heads: int, packed: bool) -> Tensor:
    """The kernel, on one tensor or on three of different strides."""
    if packed:
        return kernels.packed_temporal_attention(qkv, num_heads)
    q, k, v = qkv.chunk(3, dim=-1)
    return kernels.temporal_attention(q.contiguous(), k.transpose(1, 2).contiguous().transpose(1, 2), v, num_heads)


def distances(case: Case, device: str = "cpu") -> tuple[float, float]:
    """Relative error of the output and of the gradient."""
    torch.manual_seed(0)
    width = case.heads * case.head_width
    rows = torch.randn(case.batch, case.frames + case.images, case.tokens, 3 * width, device=device)
    qkv = rows.to(case.dtype)[:, : case.frames].requires_grad_()
    out = attention(qkv, case.heads, case.packed)
    grad = torch.randn_like(out)
    exact = qkv.detach().double().requires_grad_()
    expected = brute_force(*exact.chunk(3, dim=-1), case.heads)
    (gradient,) = torch.autograd.grad(out, qkv, grad)
    (expected_gradient,) = torch.autograd.grad(expected, exact, grad.double())
    return relative_error(out, expected), relative_error(gradient, expected_gradient)


def error_far_apart() -> float:
    """Error where offsets pass 2^31: three clips in 4 GiB of which nearly no page is ever touched."""
    stride = 2**30 + 16
    memory = torch.empty(2 * stride + 16 * 48, dtype=torch.float16)
    qkv = memory.as_strided((3, 16, 1, 48), (stride, 48, 48, 1)).normal_()
    q, k, v = qkv.chunk(3, dim=-1)
    return relative_error(kernels.temporal_attention(q, k, v, 1), brute_force(q, k, v, 1))


def check_operator() -> dict[str, str]:
    """torch's own checks of the operator: its schema, autograd, shapes in a trace."""
    checks = [f"test_{name}" for name in ("schema", "autograd_registration", "faketensor")]
    return torch.library.opcheck(kernels._packed, (torch.randn(1, 2, 1, 48, requires_grad=True), 1), test_utils=checks)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, Any]:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(interpreted: dict[str, Any], name: str) -> None:
    assert max(interpreted[name]) < BOUNDS[CASES[name].dtype]


def test_offsets_beyond_32_bits(interpreted: dict[str, Any]) -> None:
    assert interpreted["far apart"] < BOUNDS[torch.float16]


def test_operator_is_sound(interpreted: dict[str, Any]) -> None:
    assert set(interpreted["operator"].values()) == {"SUCCESS"}


@pytest.mark.gpu
@on_cuda
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force_on_cuda(name: str) -> None:
    assert max(distances(CASES[name], "cuda")) < BOUNDS[CASES[name].dtype]


@pytest.mark.gpu
@on_cuda
def test_compiled_equals_eager_on_cuda() -> None:
    qkv = torch.randn(2, 16, 9, 3 * 144, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    attend, results = kernels.packed_temporal_attention, []
    for function in (attend, torch.compile(attend, fullgraph=True)):
        out = function(qkv, 2)
        results += [(out, *torch.autograd.grad(out.float().square().sum(), qkv))]
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*results))


if __name__ == "__main__":
    figures = {name: distances(case) for name, case in CASES.items()}
    print(json.dumps({**figures, "far apart": error_far_apart(), "operator": check_operator()}))
