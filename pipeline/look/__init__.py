"""`lathe preview`: a few stored latents decoded to pictures, with the original frames above them.

- `preview`: entry point, and the choice of clips
- `stored`: clips of an output, their latents and metadata
- `originals`: the same frames from the source again
- `canary`: the same for `lathe publish`, encoded again and compared with what is stored
- `showing`: the network that decodes them, PSNR, the picture sheet
"""
