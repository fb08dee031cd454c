"""IV-VAE: 4x8x8, group-causal; a key-frame branch and a motion branch, where every convolution reads both.

`facts` (plain data), `network` with `layers` (the network as published, which training trains and builds run in steps), `vae` (ready to
run), `random_weights`.
"""
