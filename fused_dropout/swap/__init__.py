"""Puts this package's dropout in place of torch's, and shows where a model drops.

``patching`` replaces torch's functions, ``convert`` the modules of one model. ``pairing``, ``fusing`` and ``rewriting``
join a dropout with an operation beside it. ``audit`` runs a model and lists its dropouts. Users import the functions
from ``fused_dropout``.
"""

from .audit_report import AuditReport, Site
from .convert import ConvertReport

__all__ = ["AuditReport", "ConvertReport", "Site"]
