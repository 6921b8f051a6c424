"""Losses, multiple choice, exact answers, and what a network does inside."""
