"""The path from `log_access` to Postgres: buffer, writer thread, COPY, retry, spool, gaps."""
