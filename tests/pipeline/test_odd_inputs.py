"""Odd inputs: each gives the frames that a player shows, or a reject. The pixels of a frame are the same for any clip rule."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.errors import BadDataError, PolicyReject
from pipeline.video.decode import open_video
from pipeline.video.decode.planes import Geometry
from tests.odd_inputs import structure
from tests.odd_inputs.cutting import LIMITS, RULES, cut, read_through, rules
from tests.odd_inputs.damage import GROUP
from tests.odd_inputs.numbered import CORNERS, corner_colours, number_of
from tests.odd_inputs.table import ALL, DAMAGED, REFUSED, VIDEOS, Odd, made

NEAR_S = 0.0021  # Matroska and FLV round to milliseconds; a frame shown by a packet of its own comes a tick later
NEAR_COLOUR = 5
COEFFICIENTS = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722)}


def by_name(odd: Odd) -> str:
    return odd.name


def to_rgb(planes_3HW: np.ndarray, matrix: str) -> np.ndarray:
    red, blue = COEFFICIENTS[matrix]
    y = (planes_3HW[0] - 16.0) * 255 / 219
    cb, cr = ((plane - 128.0) * 255 / 224 for plane in planes_3HW[1:])
    r, b = y + 2 * (1 - red) * cr, y + 2 * (1 - blue) * cb
    return np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], -1)


@pytest.mark.parametrize("odd", VIDEOS, ids=by_name)
def test_an_odd_video_gives_the_frames_that_a_player_shows(odd):
    found = read_through(odd.data())
    if found.error is not None:
        raise found.error
    assert (found.info.height, found.info.width) == odd.size
    numbers = [number_of(planes) for planes in found.planes]
    assert [n for n in numbers if n not in odd.optional] == [n for n in odd.numbers if n not in odd.optional]
    assert len(numbers) == len(found.times_s) == found.info.num_frames
    if odd.times_s is not None:
        np.testing.assert_allclose(found.times_s, odd.times_s, atol=NEAR_S, rtol=0)
    assert (np.diff(found.times_s) > 0).all()
    if odd.end_s is not None:
        assert found.end_s == pytest.approx(odd.end_s, abs=NEAR_S)
    assert odd.warnings <= {warning.partition(":")[0] for warning in found.info.warnings}
    if odd.colours:
        colours = corner_colours(to_rgb(found.planes[0].astype(float), found.info.color_matrix))
        assert np.abs(np.array(colours) - CORNERS).max() <= NEAR_COLOUR, colours


@pytest.mark.parametrize("odd", DAMAGED, ids=by_name)
def test_damage_costs_the_frames_it_touches_and_no_others(odd):
    """Frames that are returned have the pixels of the undamaged video; all frames outside the damage are returned."""
    whole: list[np.ndarray] = []
    for make in odd.truth:
        whole += read_through(made(make)).planes
    try:
        found = cut(odd.data(), rules("every"))
    except BadDataError:
        assert odd.may_refuse
        return
    position_of = {planes.tobytes(): position for position, planes in enumerate(whole)}
    given, wrong = set(), set()
    for frames in found.clips.values():
        positions = [position_of.get(planes.tobytes()) for _, planes in frames]
        given |= set(positions) - {None}
        wrong |= {time_s for (time_s, _), position in zip(frames, positions, strict=True) if position is None}
        steps = np.diff([position for position in positions if position is not None])
        assert (steps == 1).all(), f"a clip holds frames {positions}"
    assert not wrong, f"frames at {sorted(wrong)} s are in no undamaged video"
    numbers = {odd.numbers[position] for position in given}
    assert numbers >= set(odd.numbers) - odd.lost, sorted(set(odd.numbers) - odd.lost - numbers)
    assert all(reject.reason and reject.message for reject in found.failed)


@pytest.mark.parametrize("odd", REFUSED, ids=by_name)
def test_a_file_without_frames_is_refused_with_the_reason(odd):
    with pytest.raises(BadDataError) as caught:
        read_through(odd.data())
    assert caught.value.reason in odd.reasons
    if odd.policy is not None:
        assert isinstance(caught.value, PolicyReject) == odd.policy
    assert "Invalid argument" not in caught.value.message


@pytest.mark.parametrize("odd", [*VIDEOS, *DAMAGED], ids=by_name)
def test_any_clip_rule_gives_the_same_pixels_for_the_same_frame(odd):
    data, seen = odd.data(), {}
    try:
        through = read_through(data, (64, 96))
        seen = dict(zip(through.times_s.tolist(), through.planes, strict=False))
        compared = 0
        for name in sorted(set(RULES) - {"every"}):
            for frames in cut(data, rules(name)).clips.values():
                for time_s, planes in frames:
                    known = seen.setdefault(time_s, planes)
                    assert np.array_equal(planes, known), f"the frame at {time_s} s has other pixels by {name}"
                    compared += known is not planes
    except BadDataError:
        assert odd.may_refuse
    else:
        assert compared or odd.may_refuse or len(odd.numbers) < 5


@pytest.mark.parametrize("container", ["matroska", "mp4", "mpegts"])
@pytest.mark.parametrize("make", [structure.b_frames, structure.b_frames_hevc])
def test_two_distant_frames_decode_about_one_group_each(make, container):
    video = open_video(make(container), LIMITS)
    try:
        geometry, planes = Geometry(64, 96, 0, 0, 64, 96), np.empty((2, 3, 64, 96), np.uint8)
        for out, shown in zip(planes, map(video.show, [0, 140]), strict=True):
            shown.write(out, geometry)
        assert [number_of(frame) for frame in planes] == [0, 140]
        assert video.frames_decoded <= 2 * GROUP
    finally:
        video.close()


def test_names_are_unique():
    assert len({odd.file_name for odd in ALL}) == len(ALL)
