"""Datasets: token files, tokenizers, and the windows that a step reads."""
