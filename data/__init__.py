"""Datasets, one folder each, and what they share: tokenizer.py (text), tokens.py (ids on disk)."""
