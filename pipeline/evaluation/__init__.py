"""`lathe evaluate`: how well a network reconstructs the clips of a corpus. The maths is `model.evaluation`; see docs/evaluation.md.

- `evaluate`: entry point
- `samples`: samples in progress
- `measuring`: calls into `model/`
- `rows`, `plots`: a line for each clip and reject; plots
"""
