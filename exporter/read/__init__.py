"""Read-only queries on the log and how their results are shown. Never writes."""
