"""Training of the networks in `model/`. The trainer takes any source of numbered clips.

- `trainer`: entry point; `learner` (all trained state), `optimisation`, `batches`, `starting`, `run_folder`, `metrics_log`
- `recipe`, `objective_recipe`: everything that decides a run; weights of the loss terms
- `objective`, `losses`, `discriminators`: the objective
- `networks`: networks by name with initial weights
- `initialisation`, `linear`, `inflation`: initial weights: random, principal components, from an image VAE
- `source`: numbered clips
"""
