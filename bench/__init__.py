"""The scoreboard: this library beside every public one. Run: pytest bench/ or python -m bench."""
