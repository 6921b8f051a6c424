"""Losses, multiple choice, exact match, next-token probabilities and attention weights."""
