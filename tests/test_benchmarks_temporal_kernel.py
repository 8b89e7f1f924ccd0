"""The temporal attention kernels: against float64, in torch's compiler, and through Triton's for Hopper."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
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


@pytest.mark.parametrize("packed", [True, False])
def test_compiles_to_one_launch_without_copies(hopper: Any, packed: bool) -> None:
    """Only what a kernel writes may be cloned: that q, k, v are read in place is found by torch in Triton's code."""
    from benchmarks.candidates import temporal_kernel

    qkv = torch.randn(2, 16, 3, 3 * 144)
    q, k, v = qkv.chunk(3, dim=-1)
    if packed:
        (forward,) = support.traced_launches(temporal_kernel.packed_temporal_attention, qkv, 2)
    else:
        (forward,) = support.traced_launches(temporal_kernel.temporal_attention, q, k, v, 2)
    assert forward["tensors_to_clone"] == ["out_pointer"]
    assert forward["grid"] == [(3, 1, 1)]  # 2 clips x 3 tokens x 2 heads, four at a time
    (backward,) = support.traced_launches(temporal_kernel._gradients, torch.randn(q.shape), q, k, v, 2, packed)
    assert backward["tensors_to_clone"] == ["grads_pointer"]


@pytest.mark.parametrize("kernel", ["_backward_kernel", pytest.param("_forward_kernel", marks=pytest.mark.slow)])
def test_machine_code_for_hopper(hopper: Any, kernel: str, tmp_path: Path) -> None:
    """Matrix units are used, accesses are 16 bytes wide, and no register is spilled to memory."""
    code = machine_code(kernel, hopper, tmp_path)
    assert "HMMA.16816.F32.BF16" in code
    assert "LDG.E.128" in code and "STG.E.128" in code
    assert not any(word in code for word in ("LDG.E.64", "LDG.E.U16", "STG.E.U16", "STL", "LDL"))


def machine_code(name: str, target: Any, folder: Path) -> str:
    """Disassembly of a kernel for bfloat16 at Latte-XL/2's sizes."""
    import triton
    from triton.compiler import ASTSource

    from benchmarks.candidates import temporal_kernel

    kernel = getattr(temporal_kernel, name)
    constants = {"F": 16, "H": 16, "d": 72, **temporal_kernel.Tile.of(16, 72)._asdict()}
    kinds = {name: "*bf16" if name.endswith("pointer") else "i32" for name in kernel.arg_names}
    kinds |= {"scale": "fp32", **dict.fromkeys(constants, "constexpr")}
    aligned = [i for i, kind in enumerate(kinds.values()) if kind in ("*bf16", "i32")]
    source = ASTSource(kernel, kinds, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(triton.compile(source, target=target).asm["cubin"])
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
