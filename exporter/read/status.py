"""Define which requests count as failed and as refused. The SQL functions of the same meaning are in schema.sql."""

from __future__ import annotations

_FIRST_CLIENT_ERROR = 400
_FIRST_SERVER_ERROR = 500


def is_failure(status_code: int | None) -> bool:
    """Whether a request failed: no response, or status 500 and above. In SQL: access_log_failed."""
    return status_code is None or status_code >= _FIRST_SERVER_ERROR


def is_refusal(status_code: int | None) -> bool:
    """Whether a request was refused: status 400 to 499. In SQL: access_log_refused."""
    return status_code is not None and _FIRST_CLIENT_ERROR <= status_code < _FIRST_SERVER_ERROR
