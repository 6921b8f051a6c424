"""What the prepare.py scripts of data/ share."""
