"""IV-VAE prepared for steps: equal to `model.ivvae.network` by test, bit-exact under chunking on a CPU.

`coder` (encoder and decoder), made of `blocks`, `pair_conv`, `resample` and `heads`; `stream_state` (frames kept for the next step).
"""
