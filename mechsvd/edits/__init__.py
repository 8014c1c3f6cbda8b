"""Edits: pure maps on writes, most of them gates, and how they become hooks."""
