"""Published VAEs of other projects, run by the diffusers library behind the interface of `model`.

`facts` and `presets` are plain data and import neither torch nor diffusers; `vae` is the network, `module` builds and fills the library's
class, `clips`, `frames` and `wan_stream` run it on whole clips, single frames or chunks.
"""
