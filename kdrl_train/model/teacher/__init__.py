"""Scores completions by a teacher behind a URL. How to use one: README.md."""
