"""Metrics of reconstruction quality, used by `lathe evaluate`. Needs the extra `lathe[training]`.

`roundtrip` (a clip through encoder and decoder), `fidelity` (PSNR, SSIM, LPIPS, preservation of one clip), `summary` (over many clips),
`latents` (statistics of latents), `frechet` and `i3d` (rFVD), `perceptual` (LPIPS), `examples` (selects clips for the picture sheet).
"""
