"""The engine: many edits in one forward pass, once for everybody."""
