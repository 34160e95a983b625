"""Results on the Hugging Face Hub, or on a server that speaks as it does: named, fetched, sent."""

from __future__ import annotations

from robustcompress.hub.address import Address, is_address
from robustcompress.hub.fetch import fetch
from robustcompress.hub.send import Sent, send

__all__ = ["Address", "Sent", "fetch", "is_address", "send"]
