"""The report: the whole study of several prompts as one page."""
