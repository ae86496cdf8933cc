"""What second stages do with the features of a frozen network."""
