"""Training on published latents: a small latent video diffusion transformer, to be read and copied from.

- `dit`: the network
- `flow`: flow matching: loss, sampling, random numbers that do not depend on the world size
- `training_state`: averaged weights, checkpoints, process group
- `pictures`: samples decoded to mp4 and PNG, the loss curve
- `train_dit`: training run, in one process or under `torchrun`
- `train_accelerate`: the same loop with Hugging Face Accelerate, in one page
"""
