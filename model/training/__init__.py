"""Training: what a network learns from, what it is asked for, and how. A trainer takes any iterable of clips.

- `trainer`: entry point; `learner` (everything that changes), `optimisation`, `batches`, `starting`, `run_folder`, `journal`
- `recipe`, `objective_recipe`: everything that decides a run; weights of the terms
- `objective`, `losses`, `perceptual`, `discriminators`: the objective
- `networks`: networks with gradients by name: `trainable` (LeanVAE), `trainable_wfvae`, `trainable_ivvae`, `clip_layers`, `depthwise`
- `initialisation`, `linear`, `inflation`: how a network starts: random, principal components, from an image VAE
- `latents`, `reconstruction`: latents drawn with given noise; what a network in training answers
- `source`, `scenes`: numbered clips; synthetic videos
"""
