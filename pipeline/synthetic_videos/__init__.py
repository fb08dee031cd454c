"""Synthetic videos with the statistics of natural ones: moving dead leaves, seen by a camera. Entry point: `clips`.

`clips` joins shots; `shot` builds and renders a scene from `sets`, `leaves`, `shapes`, `lettering`, `colours` and `fields`, with the
trajectories of `motion`, through `warping`; `optics` simulates lens, sensor and codec. `source`: clips for training.
"""
