"""Datasets: token files, tokenizers, and which windows a step reads."""
