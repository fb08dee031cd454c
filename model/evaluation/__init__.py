"""How well a network gives back what went in: the maths of `lathe evaluate`.

`roundtrip` (a clip through encoder and decoder), `fidelity` (PSNR, SSIM, LPIPS, preservation of one clip), `tally` (of many), `latents`
(statistics of the codes), `frechet` and `i3d` (rFVD), `pictures` (which clips to show). Needs the extra `lathe[training]`.
"""
