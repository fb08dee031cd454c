"""`lathe train`: what a job says, clips of the user's own videos, and one process of a run.

Enters: a `TrainJob`. Leaves: a folder with weights. The network and how it learns are `model.training`'s; several processes are
`pipeline.engine.ray.training`'s.
"""
