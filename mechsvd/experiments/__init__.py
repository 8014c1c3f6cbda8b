"""Experiments: the shortform's questions, each a few lines over the engine."""
