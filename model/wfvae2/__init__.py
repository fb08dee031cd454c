"""WFVAE2: the second version of WF-VAE, whose weights were never published. Blocks and stepping are those of `model.wfvae`.

`facts` (plain data), `parameters` (published names), `coder` (both directions prepared for running), `vae` (the network ready to run).
"""
