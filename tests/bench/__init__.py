"""Tests of the benchmark folder."""
