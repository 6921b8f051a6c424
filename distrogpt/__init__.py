"""What the commands are made of; they import this package."""
