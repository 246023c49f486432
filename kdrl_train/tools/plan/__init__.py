"""Implements `plan`, which estimates memory and time of a run from the models' config.json."""
