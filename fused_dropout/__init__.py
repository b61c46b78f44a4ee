"""Fused dropout for PyTorch: one pass, 16 bytes saved for backward, one mask on every device and path."""

__version__ = "0.1.0"

from . import uncertainty
from .attention import scaled_dot_product_attention
from .build_info import backend_info
from .family import alpha_dropout, drop_path, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from .functional import dropout, keep_mask
from .keys import fold_in, key, split
from .linear import DropoutLinear, dropout_linear
from .modules import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, FeatureAlphaDropout
from .neighbours import DropoutAdd, ReLUDropout, dropout_add, relu_dropout
from .swap.audit import audit
from .swap.convert import convert, convert_report, revert
from .swap.patching import patch, patched, unpatch
from .uncertainty import mc_dropout, mc_predict

# In the groups of docs/api.md.
__all__ = [  # noqa: RUF022
    # functions
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "alpha_dropout",
    "feature_alpha_dropout",
    "drop_path",
    # functions that fuse dropout with an operation beside it
    "dropout_add",
    "relu_dropout",
    "dropout_linear",
    "scaled_dot_product_attention",
    # modules
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "AlphaDropout",
    "FeatureAlphaDropout",
    "DropPath",
    "DropoutAdd",
    "ReLUDropout",
    "DropoutLinear",
    # keys and masks
    "key",
    "fold_in",
    "split",
    "keep_mask",
    # swap in, and back
    "patch",
    "unpatch",
    "patched",
    "convert",
    "revert",
    # look at a model, and at what was built
    "audit",
    "convert_report",
    "backend_info",
    # uncertainty
    "mc_dropout",
    "mc_predict",
    "uncertainty",
]
