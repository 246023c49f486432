"""A teacher behind a URL."""
