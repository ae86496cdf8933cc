"""Online: what each step sees, and the loaders that bring it."""
