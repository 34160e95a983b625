"""What others are shown of a result: a report page, a model card, a place on a hub."""

from __future__ import annotations

from robustcompress.publish.card import model_card
from robustcompress.publish.exchange import Pushed, pull, push
from robustcompress.publish.page import write_report

__all__ = ["Pushed", "model_card", "pull", "push", "write_report"]
