"""Implements `serve`, the server of a teacher."""
