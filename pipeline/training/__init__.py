"""`lathe train`: a `TrainJob` in, a folder with weights out. The network and how it learns are in `model.training`.

- `job`, `run`, `progress_log`: options; one process of a run; what it prints
- `corpus_index`, `fetching`: where the videos of a corpus lie; their bytes
- `corpus_source`, `random_clip`: clip number n of a corpus; one clip from anywhere in a video
- `unusable`: samples that no clip can be cut from
"""
