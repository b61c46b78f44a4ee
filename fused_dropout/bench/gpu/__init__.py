"""``python -m fused_dropout gpu-check``: tests and times the CUDA kernels on this GPU."""
