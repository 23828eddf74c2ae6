"""Texts, records and conversations as batches of token ids."""

from .batches import (
    Batch,
    Ids,
    PackedRecords,
    TaskWindows,
    Windows,
    evaluation_windows,
    rows_by_task,
)

__all__ = [
    "Batch",
    "Ids",
    "PackedRecords",
    "TaskWindows",
    "Windows",
    "evaluation_windows",
    "rows_by_task",
]
