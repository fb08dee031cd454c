"""WF-VAE: causal, 4x8x8 or 8x8x8; residual blocks of causal convolutions beside an energy-flow path of Haar low bands.

`facts` (plain data), `parameters` (published names), `encoder` and `decoder` with `blocks` and `wavelets` (arithmetic), `stream_state`
(tensors carried from one step to the next), `vae` (network ready to run).
"""
