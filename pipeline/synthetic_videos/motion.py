"""Motion of cameras and objects: one affine map per moment (in frames), from the rest position to the current one.

A map is float64 `(3, 3)` over homogeneous (x, y, 1), in frame pixels from the frame's centre, x to the right and y down. Speeds are
log-uniform: most things move little, some much, as in measured optical flow (Roth and Black 2007).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from pipeline.synthetic_videos.fields import wander


@dataclass(frozen=True)
class Trajectory:
    """Trajectory at N moments: `shift_N2` in pixels (x, y), `turn_N` in radians, `growth_N` as logarithm of scale."""

    shift_N2: np.ndarray = field(repr=False)
    turn_N: np.ndarray = field(repr=False)
    growth_N: np.ndarray = field(repr=False)

    def maps(self, depth: float = 1.0, about: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
        """`(N, 3, 3)`: rotation and scaling about the point `about`, then the shift; with `depth` < 1 (far away) only part of it."""
        scale = np.exp(self.growth_N * depth)
        cosine, sine = scale * np.cos(self.turn_N), scale * np.sin(self.turn_N)
        maps = np.zeros((len(scale), 3, 3))
        maps[:, 0, 0], maps[:, 0, 1], maps[:, 1, 0], maps[:, 1, 1] = cosine, -sine, sine, cosine
        x, y = about
        maps[:, 0, 2] = x - cosine * x + sine * y + depth * self.shift_N2[:, 0]
        maps[:, 1, 2] = y - sine * x - cosine * y + depth * self.shift_N2[:, 1]
        maps[:, 2, 2] = 1
        return maps


def resting(count: int) -> Trajectory:
    """Trajectory of something at rest, at `count` moments."""
    return Trajectory(np.zeros((count, 2)), np.zeros(count), np.zeros(count))


def _travel(rng: np.random.Generator, moments: np.ndarray) -> np.ndarray:
    """Distance covered at each moment for a mean speed of one per frame: uniform, starting, stopping, or oscillating."""
    middle = (moments[0] + moments[-1]) / 2
    kind = rng.random()
    if kind < 0.6:
        return moments - middle
    if kind < 0.8:  # stops or starts: a smooth ramp around some moment
        turning = rng.uniform(moments[0], moments[-1] + 1e-9)
        width = rng.uniform(0.5, 4)
        ramp = width * np.logaddexp(0, (moments - turning) / width)
        return ramp if rng.random() < 0.5 else moments - middle - ramp
    period = rng.uniform(6, 30)
    return period / (2 * np.pi) * np.sin(2 * np.pi * moments / period + rng.uniform(0, 2 * np.pi))


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def camera(rng: np.random.Generator, moments: np.ndarray, size: float) -> Trajectory:
    """Camera trajectory over a frame `size` pixels wide: at rest in a third of the scenes, else panning, zooming, rolling or handheld."""
    trajectory = resting(len(moments))
    if rng.random() < 0.35:
        return trajectory
    shift, turn, growth = trajectory.shift_N2, trajectory.turn_N, trajectory.growth_N
    if rng.random() < 0.7:
        heading = rng.integers(0, 2) * np.pi + rng.normal(0, 0.15) if rng.random() < 0.5 else rng.uniform(0, 2 * np.pi)
        speed = size * _log_uniform(rng, 3e-4, 0.016)
        shift = shift + _travel(rng, moments)[:, None] * speed * np.array([np.cos(heading), np.sin(heading)])
    if rng.random() < 0.4:
        growth = growth + np.clip(
            _travel(rng, moments) * rng.choice([-1, 1]) * _log_uniform(rng, 4e-4, 0.015), -0.35, 0.35
        )
    if rng.random() < 0.2:
        turn = turn + _travel(rng, moments) * rng.choice([-1, 1]) * _log_uniform(rng, 5e-4, 0.015)
    if rng.random() < 0.4:  # handheld: slow sway and faster tremor
        sway = size * _log_uniform(rng, 5e-4, 8e-3)
        shift = shift + sway * wander(rng, moments, 12.0, 2) + 0.25 * sway * wander(rng, moments, 2.5, 2)
        turn = turn + 0.4 * sway / size * wander(rng, moments, 10.0)[:, 0]
    return Trajectory(shift, turn, growth)


def object_trajectory(rng: np.random.Generator, moments: np.ndarray, size: float) -> Trajectory:
    """Trajectory of an object: drifting, falling, turning, growing as it comes near; some rest."""
    trajectory = resting(len(moments))
    if rng.random() < 0.15:
        return trajectory
    heading = rng.uniform(0, 2 * np.pi)
    speed = size * _log_uniform(rng, 5e-4, 0.03)
    shift = _travel(rng, moments)[:, None] * speed * np.array([np.cos(heading), np.sin(heading)])
    turn, growth = trajectory.turn_N, trajectory.growth_N
    if rng.random() < 0.4:
        turn = _travel(rng, moments) * rng.choice([-1, 1]) * _log_uniform(rng, 2e-3, 0.15)
    if rng.random() < 0.35:
        growth = np.clip(_travel(rng, moments) * rng.choice([-1, 1]) * _log_uniform(rng, 1e-3, 0.03), -0.7, 0.7)
    if rng.random() < 0.2:
        shift = shift + 0.01 * size * wander(rng, moments, 8.0, 2)
    return Trajectory(shift, turn, growth)


def fastest(maps_LN33: list[np.ndarray], per_frame: int, reach: float) -> float:
    """Largest displacement in pixels between frames, over all trajectories, of points `reach` pixels from the centre."""
    corners = np.array([[0, 0, 1], [reach, reach, 1], [-reach, reach, 1]], np.float64).T
    largest = 0.0
    for maps in maps_LN33:
        positions = maps[::per_frame, :2] @ corners
        if len(positions) > 1:
            largest = max(largest, float(np.abs(np.diff(positions, axis=0)).max()))
    return largest
