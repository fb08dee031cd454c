"""The engine of a build: who runs the stages, on which processes, and what follows when one fails.

- `driver`: decides what is to do and which worker does it
- `worker`: one encoder with its shard attempts
- `decoders`: decoder processes and the thread that feeds them
- `ray`: workers, decoders and training runs as Ray actors; the only package that imports Ray
"""
