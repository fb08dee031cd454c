"""Records that hold tensors or arrays: their `repr` shows shapes at most, so that error messages and logs stay short."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.checkpoint import Checkpoint, CheckpointInfo
from model.metrics.examples import Example
from model.metrics.roundtrip import ChunkResult
from model.posterior import Posterior
from model.reconstruction import Coefficients, Reconstruction
from model.state import CausalState
from model.training.batches import MicroBatch
from model.training.linear import BlockComponents
from model.training.source import Clip
from pipeline.encoder import Encoded
from pipeline.synthetic_videos.colours import random_palette
from pipeline.synthetic_videos.motion import resting
from pipeline.synthetic_videos.shapes import random_shape

VALUES = torch.zeros(2, 3)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "record",
    [
        Posterior(VALUES, VALUES),
        CausalState("leanvae", "encode", (1, 1), (VALUES,)),
        Checkpoint({"key": VALUES}, None, CheckpointInfo("a.pt", "0", 1, "tensors")),
        Encoded(VALUES.numpy(), VALUES.numpy(), CausalState("leanvae", "encode", (1, 1), (VALUES,))),
        Clip("key", VALUES),
        MicroBatch(0, ("key",), VALUES),
        Reconstruction(VALUES, Posterior(VALUES), Coefficients([VALUES], [VALUES])),
        Coefficients([VALUES], [VALUES]),
        BlockComponents(VALUES, VALUES, VALUES, VALUES),
        ChunkResult(VALUES, VALUES, VALUES),
        Example(1.0, "name", "title", VALUES, VALUES),
        random_palette(RNG),
        resting(3),
        random_shape(RNG, 4.0),
    ],
    ids=lambda record: type(record).__name__,
)
def test_a_record_does_not_print_its_arrays(record):
    assert "tensor(" not in repr(record)
    assert "array(" not in repr(record)
