"""Training of the networks in `model/`. The trainer takes any source of numbered clips.

- `trainer`: entry point; `learner` (all trained state), `optimisation`, `batches`, `starting`, `run_folder`, `metrics_log`
- `recipe`, `objective_recipe`: everything that decides a run; weights of the loss terms
- `objective`, `losses`, `perceptual`, `discriminators`: the objective
- `networks`: trainable networks by name: `trainable` (LeanVAE), `trainable_wfvae`, `trainable_ivvae`, `clip_layers`, `depthwise`
- `initialisation`, `linear`, `inflation`: initial weights: random, principal components, from an image VAE
- `latents`, `reconstruction`: sampling of latents; output of a trainable network
- `source`, `scenes`: numbered clips; synthetic videos
"""
