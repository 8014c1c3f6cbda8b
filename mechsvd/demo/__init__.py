"""The embedded model: its little language, its training, and its weights, so that everything works offline."""

from pathlib import Path

WEIGHTS = (
    Path(__file__).parent / "weights"
)  # a plain Hugging Face directory, loaded like any local checkpoint
