"""`lathe preview`: a few stored latents as pictures, the originals above what they decode to.

- `preview`: entry point
- `stored`: clips of an output, their latents and metadata
- `originals`: the same frames from the source again
- `canary`: the same for `lathe publish`, encoded again and compared with what is stored
- `showing`: the network that decodes them, PSNR, the sheet
"""
