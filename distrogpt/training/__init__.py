"""The parts of train.py's loop."""
