"""Models in the folders that transformers reads."""
