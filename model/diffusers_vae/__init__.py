"""The published VAEs of other projects, run by the diffusers library behind our doors.

`facts.py` and `presets.py` are plain data and load neither torch nor diffusers; `vae.py` is the network, `module.py` builds and fills the
library's class, `clips.py`, `frames.py` and `wan_stream.py` are the ways through it.
"""
