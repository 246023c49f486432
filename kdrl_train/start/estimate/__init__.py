"""Predicts the memory of a run, term by term, from the shapes of its models."""
