"""LeanVAE: causal, 4x8x8 by default; Haar transform and linear patches around NAF layers, latents by compressed sensing.

`facts` (plain data), `network` with `haar` and `depthwise` (the network as published, which training trains), `fast` (the same prepared for
encoding in steps), `vae` (network ready to run), `random_weights`.
"""
