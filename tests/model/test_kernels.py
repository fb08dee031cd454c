"""GPU kernels: interpreted on a CPU against their references, compiled for a Hopper GPU; choice of the backend."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import kernels

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# of the largest value: float32 sums in another order; else one step of the stored type (the interpreter truncates)
BOUNDS = {"float32": 1e-6, "bfloat16": 2**-7, "float16": 2**-10}


def answer_of(program: str, *arguments: str) -> dict:
    command = [sys.executable, str(HERE / program), *arguments]
    child = subprocess.run(
        command, env={"PYTHONPATH": str(ROOT)}, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout.splitlines()[-1])


def test_interpreted_kernels_equal_their_references():
    errors = answer_of("interpreted_kernels.py")
    assert set(errors) == {"gate", "layer", "pixels"}
    for kernel, cases in errors.items():
        for case, error in cases.items():
            assert error <= BOUNDS[case.split(",")[0]], (kernel, case, error)


def test_kernels_compile_for_hopper_without_spilling():
    """Widths of the published networks and of the largest Wan-aligned one."""
    spilled = answer_of("compiled_kernels.py", "128", "384", "512", "768")
    assert set(spilled) == {"layer 128", "layer 384", "layer 512", "layer 768", "gate", "pixels"}
    assert not any(spilled.values()), spilled


def without_triton(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else found(name))


def test_the_backend_follows_device_and_dtype(monkeypatch):
    half, full = torch.bfloat16, torch.float32
    assert [kernels.choose(CUDA, half), kernels.choose(CUDA, full), kernels.choose(CPU, half)] == [
        "fused",
        "plain",
        "plain",
    ]
    assert kernels.choose(CUDA, half, "plain") == "plain"
    without_triton(monkeypatch)
    assert kernels.choose(CUDA, half) == "plain"


def test_backends_that_cannot_run_are_refused(monkeypatch):
    with pytest.raises(ValueError, match="backend must be one of plain, fused; got 'fast'"):
        kernels.choose(CPU, torch.float32, "fast")
    with pytest.raises(ValueError, match=r"bfloat16 or float16 on CUDA; got torch.bfloat16 on cpu"):
        kernels.choose(CPU, torch.bfloat16, "fused")
    with pytest.raises(ValueError, match=r"got torch.float32 on cuda"):
        kernels.choose(CUDA, torch.float32, "fused")
    without_triton(monkeypatch)
    with pytest.raises(ValueError, match="triton, which is not installed"):
        kernels.choose(CUDA, torch.bfloat16, "fused")


def test_plain_networks_do_not_import_triton():
    program = (
        "import sys, model; small = dict(embedding_dim=8, l_dim=4, h_dim=4); "
        "vae = model.load('leanvae-dim4', config=small, untrained=0); assert vae.backend == 'plain'; "
        "assert 'plain' in repr(vae) and 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=300)
