"""The engine: many edits in one forward pass, measured against the clean run."""
