"""LeanVAE prepared for encoding in steps: equal to `model.leanvae.network` by test, bit-exact under chunking on a CPU.

`coder` (encoder and decoder), `pixels` (frames in and out), `tokens` (NAF layers and their history), `folding` (wavelets and patches as
one matrix), `fused` (the same on GPU kernels).
"""
