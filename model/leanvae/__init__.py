"""LeanVAE: causal, 4x8x8 by default; Haar transform and linear patches around NAF layers, latents by compressed sensing.

`facts` (plain data), `parameters` (published names), `coder` with `haar`, `pixels` and `tokens` (arithmetic), `fused` (the same on
GPU kernels), `vae` (network ready to run).
"""
