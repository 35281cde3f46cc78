"""Identify the remote and the package that a URL belongs to."""
