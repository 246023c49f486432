"""`serve`: a teacher's server."""
