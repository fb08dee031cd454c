"""IV-VAE: 4x8x8, group-causal, a key-frame branch and a motion branch that read each other in every convolution.

`facts` (plain data), `parameters` (published names), `coder` with `pair_conv`, `blocks`, `resample` and `heads`
(arithmetic), `memory` (what a run holds), `vae` (the network ready to run).
"""
