"""IV-VAE: 4x8x8, group-causal; a key-frame branch and a motion branch, where every convolution reads both.

`facts` (plain data), `parameters` (published names), `coder` with `pair_conv`, `blocks`, `resample` and `heads` (arithmetic),
`stream_state` (past frames and buffers of a step), `vae` (network ready to stream).
"""
