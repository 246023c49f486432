"""Reads the answers of completions and of data sets, strictly, and says which are equal."""
