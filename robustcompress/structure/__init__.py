"""What the network is made of; knows nothing of robustness."""

from robustcompress.structure.attention import AttentionKind, teach_attention
from robustcompress.structure.editor import StructuralEditor
from robustcompress.structure.groups import NEW, Axis, ChannelGroup, Edit, Segment

__all__ = ["NEW", "AttentionKind", "Axis", "ChannelGroup", "Edit", "Segment", "StructuralEditor", "teach_attention"]
