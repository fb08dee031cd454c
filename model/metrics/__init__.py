"""Metrics of reconstruction quality, used by `lathe evaluate`.

`roundtrip` (a clip through encoder and decoder), `frames` (PSNR and SSIM of frames), `fidelity` (these, LPIPS and preservation, of one
clip), `summary` (over many clips),
`latents` (statistics of latents), `frechet` and `i3d` (rFVD), `perceptual` (LPIPS), `examples` (selects clips for the picture sheet).
"""
