"""The published VAEs of other projects, run by the diffusers library behind the interface of `model`.

`facts` and `presets` are plain data and load neither torch nor diffusers; `vae` is the network, `module` builds and fills the
library's class, `clips`, `frames` and `wan_stream` are the ways through it.
"""
