"""Loader of published latents: an order that can be proven, resumed anywhere.

- `rules`: how many latents make a global batch
- `draws`: counter-based random numbers
- `epoch`, `mixture`, `order`: batches of one epoch; which dataset a step takes; both together
"""
