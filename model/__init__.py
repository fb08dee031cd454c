"""Video VAEs with explicit causal state. Knows nothing of the pipeline, of Ray or of storage.

Public names: `load`, `from_state_dict`, `names`, `spec` and the types of `model.interface`.
Importing this package loads no torch; the functions do.
"""
