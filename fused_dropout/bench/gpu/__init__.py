"""``python -m fused_dropout gpu-check``: whether the CUDA kernels are right on this GPU, and how fast."""
