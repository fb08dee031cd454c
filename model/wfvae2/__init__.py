"""WFVAE2: the second version of WF-VAE, whose weights were not published. Layers and stepping are those of `model.wfvae`.

`facts` (plain data), `network` (as published), `vae` (network ready to run).
"""
