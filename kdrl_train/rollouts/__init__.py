"""Turns problems into judged completions: reads, samples and verifies. How: README.md."""
