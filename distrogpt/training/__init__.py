"""What train.py's loop is made of."""
