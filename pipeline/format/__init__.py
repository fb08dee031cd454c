"""What a latent file is: columns, tensors, byte index. No torch."""
