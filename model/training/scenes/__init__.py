"""Synthetic videos with the statistics of natural ones: moving dead leaves, filmed. The door is `clips`.

`clips` joins shots; `shot` builds and films a scene of `sets`, `leaves`, `shapes`, `lettering`, `colours`, `fields`, along the
courses of `motion`, through `warping`; `optics` is lens, sensor and codec.
"""
