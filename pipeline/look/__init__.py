"""`lathe preview`: a few of an output's stored latents as pictures, the originals above what they decode to.

`preview` (the order of things), `stored` (clips of an output, their latents and facts), `originals` (the same frames from the source
again), `showing` (the door to `model/`: decoding, PSNR, the sheet), `wording` (how it reads on a terminal).
"""
