"""Execution of the stages: scheduling on processes, and failure handling.

- `driver`: decides what is to do and which worker does it
- `worker`: one encoder with its shard attempts
- `decoders`: decoder processes and the thread that feeds them
- `nvdec`: decoder processes that use the video decoder of a GPU
- `ray`: workers, decoders and training runs as Ray actors; the only package that imports Ray
"""
