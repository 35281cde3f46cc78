"""Turn an Exchange into a row: decode, bound, redact, identify. No I/O to Postgres, no threads."""
