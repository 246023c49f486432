"""The scoreboard compares this library with public ones: pytest bench/ or python -m bench."""
