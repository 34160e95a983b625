"""Certificates: what no attack can undo, in contrast to what the attacks that were run did not find."""

from __future__ import annotations

from robustcompress.certify.binomial import lower_bound
from robustcompress.certify.certify import certify, checked_settings
from robustcompress.certify.plot import plot_certificates
from robustcompress.certify.report import ABSTAINS, METHODS, CertificateReport, save_certificate
from robustcompress.certify.smoothing import certified_radius

__all__ = [
    "ABSTAINS",
    "METHODS",
    "CertificateReport",
    "certified_radius",
    "certify",
    "checked_settings",
    "lower_bound",
    "plot_certificates",
    "save_certificate",
]
