"""The model: the only room that knows TransformerLens."""
