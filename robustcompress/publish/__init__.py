"""What others are shown of a result: a report page, a model card, a place on a hub."""

from __future__ import annotations

from robustcompress.publish.page import write_report

__all__ = ["write_report"]
