"""`lathe train`: runs a `TrainJob`, which writes a folder with weights. Networks and training are in `model.training`.

- `job`, `run`, `progress_log`: options; one process of a run; its messages
- `corpus_index`, `fetching`: locations of a corpus's videos; fetching their bytes
- `corpus_source`, `random_clip`: clip number n of a corpus; a random clip of a video
- `decoder_process`: forked process that draws clips and may crash
- `data_record`: what decides the clips, recorded and compared when a run continues
- `unusable`: list of samples without a usable clip
"""
