"""From a command line to a finished run: the same for every method."""
