"""Tests the benchmark folder."""
