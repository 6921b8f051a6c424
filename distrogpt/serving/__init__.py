"""The HTTP server of serve.py."""
