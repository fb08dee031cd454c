"""Decoder processes that use NVDEC, the video decoder of an NVIDIA GPU (ADR 25); the only decoder processes that load torch.

- `lanes`, `lane_process`: lanes as child processes that see the encoder's GPU; their program
- `decoder`: pictures decoded by NVDEC through libav, and the check of it before the first video
- `scaler`, `bicubic`: scaling on the GPU with the bits of swscale; swscale's filters as integer matrices
"""
