"""Rendering of one shot: builds a scene and returns frames, float32 `(T, 3, H, W)`.

From back to front: ground (sky, colour field or leaves), ridges, layers of leaves at several depths, objects with their own trajectories,
letters. The camera moves over all of it, near layers faster than far ones. A frame is the mean over moments while the shutter is open.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from pipeline.synthetic_videos import colours, fields, leaves, motion, optics, sets, warping
from pipeline.synthetic_videos.warping import DENSITY

_MARGIN = 1.25  # canvas size over frame size; beyond the canvas its mirror image is shown
_MOMENTS = 4  # most moments per frame


@dataclass(frozen=True)
class SceneSetup:
    """Common data of all parts of a shot: frame size, size of the picture it is cut from, camera trajectory."""

    frames: int
    frame: tuple[int, int]
    size: float
    camera: motion.Trajectory
    moments: np.ndarray = field(repr=False)
    palette: colours.Palette
    moving: bool

    @property
    def canvas(self) -> tuple[int, int]:
        """Height and width of a canvas that fills the frame."""
        return int(self.frame[0] * DENSITY * _MARGIN), int(self.frame[1] * DENSITY * _MARGIN)

    def canvas_maps(
        self, trajectory: motion.Trajectory | None, depth: float, x: float = 0.0, y: float = 0.0
    ) -> np.ndarray:
        """Maps `(N, 3, 3)` from a canvas at (x, y) and `depth`, with its own trajectory, to the frame."""
        rest = np.array([[1 / DENSITY, 0, x], [0, 1 / DENSITY, y], [0, 0, 1]])
        own = np.eye(3) if trajectory is None else trajectory.maps(about=(x, y))
        return self.camera.maps(depth) @ own @ rest

    def trajectory(self, rng: np.random.Generator, scale: float = 1.0) -> motion.Trajectory | None:
        """Random trajectory for a part of the scene; None if nothing moves."""
        return motion.object_trajectory(rng, self.moments, self.size * scale) if self.moving else None


@dataclass(frozen=True)
class ScenePart:
    """Canvas of the scene, float32 `(4, h, w)` (`(3, h, w)` for the ground), and its map at each moment, `(N, 3, 3)`."""

    canvas: np.ndarray = field(repr=False)
    maps_N33: np.ndarray = field(repr=False)


def render(rng: np.random.Generator, frames: int, height: int, width: int, *, moving: bool = True) -> torch.Tensor:
    """Renders a shot: float32 `(frames, 3, height, width)`, values about [0, 1]. `moving=False` keeps everything still."""
    size = max(height, width) * float(np.exp(rng.uniform(0, np.log(2.0))))  # the frame may be part of a larger picture
    shutter = rng.uniform(0.1, 0.9)
    moments = (np.arange(frames)[:, None] + shutter * np.arange(_MOMENTS) / _MOMENTS).ravel()
    camera = motion.camera(rng, moments, size) if moving else motion.resting(len(moments))
    setup = SceneSetup(frames, (height, width), size, camera, moments, colours.random_palette(rng), moving)
    materials = leaves.random_materials(rng, setup.palette, setup.canvas[1], sets.SHARPEST)
    parts = [*_scenery(rng, setup, materials), *_objects(rng, setup, materials), *_letters(rng, setup)]
    speed = motion.fastest([part.maps_N33 for part in parts], _MOMENTS, DENSITY * min(height, width) / 3) * shutter
    blur = 1 if speed < 1 else 2 if speed < 3 else _MOMENTS
    step = _MOMENTS // blur
    shown = [ScenePart(part.canvas, part.maps_N33[::step]) for part in parts]
    return _render(rng, shown, setup, blur)


def _scenery(rng: np.random.Generator, setup: SceneSetup, materials: leaves.Materials) -> list[ScenePart]:
    """Ground, ridges and layers of leaves that fill the frame, from far to near."""
    height, width = setup.canvas
    size = setup.size * DENSITY
    depth = rng.uniform(0.2, 1.0)
    parts = [
        ScenePart(_defocused(rng, sets.ground(rng, materials, height, width, size)), setup.canvas_maps(None, depth))
    ]
    for _ in range(int(rng.choice([0, 1, 2, 3], p=[0.6, 0.2, 0.12, 0.08]))):
        depth = min(depth + rng.uniform(0, 0.3), 1.3)
        parts.append(ScenePart(sets.ridge(rng, materials, height, width), setup.canvas_maps(None, depth)))
    for _ in range(int(rng.choice([0, 1, 2], p=[0.55, 0.33, 0.12]))):
        depth = min(depth + rng.uniform(0, 0.6), 2.0)
        canvas = leaves.empty(height, width)
        largest = size * rng.uniform(0.05, 0.3)
        sets.scatter(rng, canvas, materials, int(np.exp(rng.uniform(np.log(3), np.log(60)))), 3.0, largest)
        if rng.random() < 0.12:  # glass, smoke, a fading picture
            canvas *= np.float32(rng.uniform(0.2, 0.9))
        trajectory = setup.trajectory(rng, 0.4) if rng.random() < 0.5 else None
        parts.append(ScenePart(_defocused(rng, canvas), setup.canvas_maps(trajectory, depth)))
    return parts


def _objects(rng: np.random.Generator, setup: SceneSetup, materials: leaves.Materials) -> list[ScenePart]:
    """Objects with their own trajectories in front of the scenery."""
    parts = []
    height, width = setup.frame
    count = min(int(rng.geometric(0.25)) - 1, 10)
    for radius in leaves.radii(rng, count, 0.03 * setup.size, 0.35 * setup.size):
        x, y = rng.uniform(-0.55, 0.55, 2) * (width, height)
        canvas = sets.clump(rng, materials, min(float(radius), 0.6 * max(height, width)) * DENSITY)
        parts.append(
            ScenePart(_defocused(rng, canvas), setup.canvas_maps(setup.trajectory(rng), rng.uniform(0.7, 1.3), x, y))
        )
    return parts


def _letters(rng: np.random.Generator, setup: SceneSetup) -> list[ScenePart]:
    """Titles fixed on the screen, and signs that belong to the scene."""
    if rng.random() > 0.15:
        return []
    height, width = setup.frame
    parts = []
    for _ in range(int(rng.integers(1, 4))):
        tall = DENSITY * max(setup.size * np.exp(rng.uniform(np.log(0.03), np.log(0.15))), 6)
        canvas = sets.letters(rng, setup.palette, tall, int(1.2 * width * DENSITY))
        x, y = rng.uniform(-0.35, 0.35) * width, rng.uniform(-0.45, 0.45) * height
        on_screen = rng.random() < 0.6
        parts.append(
            ScenePart(
                canvas, setup.canvas_maps(None if on_screen else setup.trajectory(rng), 0.0 if on_screen else 1.0, x, y)
            )
        )
    return parts


def _defocused(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """The canvas, sometimes blurred as if out of focus."""
    if rng.random() > 0.12:
        return canvas
    sigma = float(np.exp(rng.uniform(np.log(0.8), np.log(5))))
    return optics.gaussian(torch.from_numpy(np.ascontiguousarray(canvas))[None], sigma)[0].numpy()


def _render(rng: np.random.Generator, parts: list[ScenePart], setup: SceneSetup, blur: int) -> torch.Tensor:
    """Composites the parts at every moment, and averages the moments of each frame."""
    count = setup.frames * blur
    height, width = setup.frame
    flow = _flow(rng, setup, blur)
    ground, *others = parts
    canvas = torch.from_numpy(np.ascontiguousarray(ground.canvas))
    once = flow is None and warping.still(ground.maps_N33)
    maps = ground.maps_N33[:1] if once else ground.maps_N33
    shown = warping.sample(canvas, maps, (0, height, 0, width), setup.frame, beyond="reflection", flow_N2HW=flow)
    if once:
        shown = shown.expand(count, -1, -1, -1).contiguous()
    _shimmer(rng, shown, setup, blur)
    for part in others:
        warping.lay_over(shown, torch.from_numpy(np.ascontiguousarray(part.canvas)), part.maps_N33)
    return shown.reshape(setup.frames, blur, 3, height, width).mean(1) if blur > 1 else shown


def _flow(rng: np.random.Generator, setup: SceneSetup, blur: int) -> torch.Tensor | None:
    """Displacements of a deforming ground (cloth, water, air, a crowd), `(N, 2, H, W)` in pixels, or None."""
    if not setup.moving or rng.random() > 0.25:
        return None
    cells = int(rng.integers(3, 10))
    field = fields.power_field(rng, (setup.frames, 2, cells, cells), 1.3, (rng.uniform(0.5, 4), 0.3, 1, 1))
    field *= np.float32(setup.size * np.exp(rng.uniform(np.log(1e-3), np.log(0.02))))
    return warping.ripple(torch.from_numpy(np.repeat(field, blur, axis=0)), setup.frame)


def _shimmer(rng: np.random.Generator, frames_N3HW: torch.Tensor, setup: SceneSetup, blur: int) -> None:
    """Brightness changes of the ground's texture (water, foliage, fire); in place."""
    if not setup.moving or rng.random() > 0.12:
        return
    height, width = -(-setup.frame[0] // 2), -(-setup.frame[1] // 2)
    field = fields.power_field(rng, (setup.frames, height, width), rng.uniform(0.9, 1.5), (rng.uniform(0.5, 3), 1, 1))
    field *= np.float32(np.exp(rng.uniform(np.log(0.01), np.log(0.15))))
    light = torch.from_numpy(np.repeat(field, blur, axis=0))[:, None]
    light = torch.nn.functional.interpolate(light, size=setup.frame, mode="bilinear", align_corners=False)
    frames_N3HW.mul_(light.add_(1))
