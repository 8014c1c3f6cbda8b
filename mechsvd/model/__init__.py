"""The model: the only package that knows TransformerLens."""
