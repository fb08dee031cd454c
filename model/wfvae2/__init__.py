"""WFVAE2: the second version of WF-VAE, whose weights were not published. Blocks and stepping are those of `model.wfvae`.

`facts` (plain data), `parameters` (published names), `coder` (encoder and decoder prepared for speed), `vae` (network ready to run).
"""
