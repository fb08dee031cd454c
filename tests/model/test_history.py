"""History of causal layers over steps."""

import pytest
import torch

from model.history import WHOLE, History


@pytest.mark.parametrize("start", ["zeros", "first"])
@pytest.mark.parametrize("cuts", [(1, 4, 7), (2, 7), (7,)])
def test_steps_see_what_a_whole_video_sees(start, cuts):
    x_BCT = torch.arange(2 * 3 * 7.0).reshape(2, 3, 7) + 1
    whole = WHOLE.extend(x_BCT, 2, axis=2, start=start)
    assert torch.equal(whole[..., :2], torch.zeros(2, 3, 2) if start == "zeros" else x_BCT[..., :1].expand(2, 3, 2))
    past, begin = None, 0
    for end in cuts:
        history = History(past)
        seen = history.extend(x_BCT[..., begin:end], 2, axis=2, start=start)
        assert history.first == (begin == 0)
        assert torch.equal(seen, whole[..., begin : end + 2])
        past, begin = history.tensors(), end


def test_layers_are_numbered_by_their_order():
    history = History()
    for value in (1.0, 2.0):
        assert history.take() is None
        history.keep(torch.full((1,), value))
    history = History(history.tensors())
    assert [float(history.take()), float(history.take())] == [1.0, 2.0]


def test_a_state_owns_its_memory():
    x = torch.ones(1, 3, 100)
    history = History()
    history.extend(x, 2, axis=2, start="zeros")
    assert history.tensors()[0].untyped_storage().nbytes() == 1 * 3 * 2 * 4


def test_another_number_of_layers_is_an_error():
    with pytest.raises(RuntimeError, match="layer 0 has no history"):
        History(()).take()
    with pytest.raises(RuntimeError, match="0 layers took a history and 0 kept one, of 1"):
        History((torch.ones(1),)).tensors()


def test_a_whole_video_keeps_nothing():
    WHOLE.extend(torch.ones(1, 1, 3), 2, axis=2, start="zeros")
    assert WHOLE.tensors() == ()
