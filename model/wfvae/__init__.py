"""WF-VAE: 4x8x8 or 8x8x8, causal, residual blocks of causal convolutions beside an energy-flow path of Haar low bands.

`facts` (plain data), `parameters` (published names), `encoder` and `decoder` with `blocks` and `wavelets` (arithmetic), `memory` (what
a step leaves for the next), `vae` (the network ready to run).
"""
