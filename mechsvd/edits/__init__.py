"""Edits: pure maps on writes, most of them gates, and the hooks made from them."""
