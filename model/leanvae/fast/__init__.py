"""LeanVAE on fused GPU kernels (`model.kernels`), for 16-bit arithmetic on CUDA: its linear maps folded into fewer, its steps recorded.

`runner` (steps), `coder` (encoder and decoder), `layers` (NAF layers and their history), `pixels` (input of a step), `folding` (Haar
transform and projection as one matrix). Equal to `model.leanvae.network` up to rounding, by test.
"""
