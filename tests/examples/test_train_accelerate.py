"""`examples/train_accelerate.py`: a continued run has the weights of one that was not interrupted."""

import pytest
from safetensors.torch import load_file

pytest.importorskip("accelerate", reason="a development extra: pip install -e '.[dev]'")

SIZES = {"width": 32, "depth": 1, "heads": 2}


def test_accelerate_keeps_the_place_of_the_loader(output, tmp_path):
    from examples.train_accelerate import train

    train(str(output), str(tmp_path / "whole"), 5, batch=4, **SIZES)
    for steps in (3, 5):
        train(str(output), str(tmp_path / "continued"), steps, batch=4, **SIZES)
    whole, continued = (load_file(tmp_path / run / "5" / "model.safetensors") for run in ("whole", "continued"))
    assert whole.keys() == continued.keys()
    assert all(whole[name].equal(continued[name]) for name in whole)
    assert sorted(path.name for path in (tmp_path / "continued").iterdir()) == ["3", "5"]
