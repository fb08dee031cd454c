"""Outputs of the published LeanVAE code for a tiny network ("golden" vectors), and that network loaded here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

import model
from tests import threads

if TYPE_CHECKING:
    from collections.abc import Iterator

FIXTURES = Path(__file__).parents[1] / "fixtures"


class Golden:
    """`tensors` by name, `config`, `weights` by published key."""

    def __init__(self, name: str) -> None:
        self.tensors = load_file(FIXTURES / f"{name}.safetensors")
        self.config: dict[str, Any] = json.loads((FIXTURES / f"{name}.json").read_text())["config"]
        self.weights = {
            key.removeprefix("weights/"): t for key, t in self.tensors.items() if key.startswith("weights/")
        }

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def check(self, name: str, got: torch.Tensor) -> None:
        """Compares `got` with a golden tensor, within the published tolerance."""
        want = self[name]
        assert got.shape == want.shape, name
        worst, allowed = (got - want).abs().max().item(), 1e-5 * max(1.0, want.abs().max().item())
        assert worst <= allowed, f"{name}: off by {worst:.2e}, allowed {allowed:.2e}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs with one thread: tiny networks gain nothing from more, and lose much on a busy machine."""
    with threads.one_thread():
        yield


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden("leanvae-tiny")


@pytest.fixture(scope="session")
def vae(golden: Golden) -> Any:
    return model.from_state_dict("leanvae", golden.config, golden.weights)
