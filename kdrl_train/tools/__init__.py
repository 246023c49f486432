"""The commands beside `train`."""
