"""What the network is made of; knows nothing of robustness."""

from robustcompress.structure.attention import AttentionKind, teach_attention
from robustcompress.structure.editor import StructuralEditor
from robustcompress.structure.groups import (
    NEW,
    AnyEdit,
    Axis,
    Bypass,
    ChannelGroup,
    Edit,
    Factorise,
    Insert,
    Segment,
    edit_from_json,
)
from robustcompress.structure.layer_kind import LayerKind
from robustcompress.structure.teaching import teach_layer

__all__ = [
    "NEW",
    "AnyEdit",
    "AttentionKind",
    "Axis",
    "Bypass",
    "ChannelGroup",
    "Edit",
    "Factorise",
    "Insert",
    "LayerKind",
    "Segment",
    "StructuralEditor",
    "edit_from_json",
    "teach_attention",
    "teach_layer",
]
