"""Measures speed and memory. ``command`` is ``python -m fused_dropout bench``, and ``gpu`` needs a CUDA device."""
