"""`lathe evaluate`: reconstruction quality of a network on the clips of a corpus. Metrics are in `model.metrics`; see
docs/evaluation.md.

- `evaluate`: entry point
- `samples`: samples in progress
- `measuring`: calls into `model/`
- `rows`, `plots`: a row for each clip and reject; plots
"""
