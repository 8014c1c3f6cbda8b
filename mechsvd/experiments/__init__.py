"""Experiments: the shortform's questions, each a few lines on top of the engine."""
