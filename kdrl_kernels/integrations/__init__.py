"""Puts the kernels into other people's trainers. One module a host, which only its users import.

A host is an extra, never a dependency; importing its module without it, or with another version
than it was tried with, raises an ImportError of one line.
"""
