"""Checkpoints: a killed run goes on where it was."""

from robustcompress.checkpoint.agreement import agree, digest
from robustcompress.checkpoint.disk import NotWrittenError
from robustcompress.checkpoint.files import AUTOATTACK, Checkpoint, check_directory, read, remove, shrink, write
from robustcompress.checkpoint.identity import fingerprint, same_run
from robustcompress.checkpoint.journal import Journal
from robustcompress.checkpoint.state import State, Stateful

__all__ = [
    "AUTOATTACK",
    "Checkpoint",
    "Journal",
    "NotWrittenError",
    "State",
    "Stateful",
    "agree",
    "check_directory",
    "digest",
    "fingerprint",
    "read",
    "remove",
    "same_run",
    "shrink",
    "write",
]
