"""The code that the prepare.py scripts in data/ share."""
