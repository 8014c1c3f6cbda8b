"""The embedded model, which works offline: its small language, training and weights."""

from pathlib import Path

# a plain Hugging Face directory, loaded like any local checkpoint
WEIGHTS = Path(__file__).parent / "weights"
