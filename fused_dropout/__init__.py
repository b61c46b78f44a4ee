"""Fused dropout for PyTorch: one pass, 16 bytes saved for backward, one mask on every device and path."""

__version__ = "0.1.0"

from .attention import scaled_dot_product_attention
from .audit import AuditReport, audit
from .build_info import BackendInfo, backend_info
from .convert import ConvertReport, convert, convert_report, revert
from .family import alpha_dropout, drop_path, dropout1d, dropout2d, dropout3d, feature_alpha_dropout
from .functional import dropout, keep_mask
from .keys import fold_in, key, split
from .linear import DropoutLinear, dropout_linear
from .modules import AlphaDropout, Dropout, Dropout1d, Dropout2d, Dropout3d, DropPath, FeatureAlphaDropout
from .neighbours import DropoutAdd, ReLUDropout, dropout_add, relu_dropout
from .patching import patch, patched, unpatch
from .uncertainty import mc_dropout, mc_predict

__all__ = [
    "AlphaDropout",
    "AuditReport",
    "BackendInfo",
    "ConvertReport",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "DropoutAdd",
    "DropoutLinear",
    "FeatureAlphaDropout",
    "ReLUDropout",
    "alpha_dropout",
    "audit",
    "backend_info",
    "convert",
    "convert_report",
    "drop_path",
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "dropout_add",
    "dropout_linear",
    "feature_alpha_dropout",
    "fold_in",
    "keep_mask",
    "key",
    "mc_dropout",
    "mc_predict",
    "patch",
    "patched",
    "relu_dropout",
    "revert",
    "scaled_dot_product_attention",
    "split",
    "unpatch",
]
