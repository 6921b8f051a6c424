"""The HTTP server behind serve.py."""
