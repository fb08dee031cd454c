"""Published VAEs of other projects, run by the diffusers library behind the interface of `model`.

`facts`, `classes`, `strides` and `presets` are plain data and import neither torch nor diffusers; `vae` is the network, `module` builds and
fills the library's class, `clips`, `frames`, `wan_stream` and `causal_stream` run it on whole clips, single frames or chunks.
"""
