"""How fast is it? ``command`` is ``python -m fused_dropout bench``, ``gpu`` what needs a CUDA device."""
