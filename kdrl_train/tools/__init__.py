"""Holds the commands other than `train` and `check`."""
