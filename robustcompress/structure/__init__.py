"""What the network is made of; knows nothing of robustness."""

from robustcompress.structure.editor import StructuralEditor
from robustcompress.structure.groups import NEW, Axis, ChannelGroup, Edit, Segment

__all__ = ["NEW", "Axis", "ChannelGroup", "Edit", "Segment", "StructuralEditor"]
