"""Several processes that train one network: who they are, how they agree, and who has which part of a batch."""

from robustcompress.distributed.parts import Parts, plan
from robustcompress.distributed.start import current, launched, start, stop
from robustcompress.distributed.world import ALONE, DistributedError, World

__all__ = ["ALONE", "DistributedError", "Parts", "World", "current", "launched", "plan", "start", "stop"]
