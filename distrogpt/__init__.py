"""Everything that nobody types: the commands in the folder above import it."""
