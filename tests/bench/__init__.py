"""Measurements, and the data to measure with; no tests."""
