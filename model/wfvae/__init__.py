"""WF-VAE: causal, 4x8x8 or 8x8x8; residual blocks of causal convolutions beside an energy-flow path of Haar low bands.

`facts` (plain data), `network` with `layers` and `wavelets` (the network as published, which training trains and builds run in steps),
`vae` (network ready to run), `random_weights`.
"""
