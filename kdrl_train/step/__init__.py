"""One training step, in the order of its parts."""
