"""Connections, error classification, the embedded server and the schema. Knows no rows."""
