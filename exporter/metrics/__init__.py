"""Metrics of one proxy for Prometheus, over HTTP. Knows the figures of the log only as a mapping."""
