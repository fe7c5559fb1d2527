"""Community files in, community files out, from the command line: `python -m convert`."""
