"""The coordinator: one process per host that owns the truth in the segment."""
