"""One file a command: paths and values in, one value out. Nothing is printed here."""
