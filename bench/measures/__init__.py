"""Measures speed, memory, accuracy and growth; each module gives records of results_file.py."""
