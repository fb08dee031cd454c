"""WF-VAE and WFVAE2 prepared for steps: equal to `model.wfvae.network` by test, bit-exact under chunking on a CPU.

`encoder` and `decoder`, made of `blocks`; `stream_state` (tensors carried from one step to the next).
"""
