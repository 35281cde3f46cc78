"""A client for the HTTP API of mitmweb, with its token."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit


class WebInterface:
    """Pages, options and commands of a running mitmweb.

    Args:
        url: the URL of its page, with the token.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._token = parse_qs(parts.query)["token"][0]

    def options(self) -> dict[str, dict[str, Any]]:
        """Return all options by name, each with its value and help."""
        _, text = self._call("GET", "/options")
        options: dict[str, dict[str, Any]] = json.loads(text)
        return options

    def get(self, path: str, *, authorized: bool = True) -> tuple[int, str]:
        """Return the status code and text of a page."""
        return self._call("GET", path, authorized=authorized)

    def set_options(self, **values: object) -> tuple[int, str]:
        """Change options. Return the status code and text of the response."""
        return self._call("PUT", "/options", values)

    def status(self) -> dict[str, Any]:
        """Return the result of the command artifactapi.status."""
        code, text = self._call("POST", "/commands/artifactapi.status", {"arguments": []})
        assert code == 200, text
        value: dict[str, Any] = json.loads(json.loads(text)["value"])
        return value

    def post(self, path: str) -> int:
        """Send a POST with an empty body. Return the status code."""
        return self._call("POST", path, {})[0]

    def post_without_token(self, path: str) -> int:
        """Send a POST without the token. Return the status code."""
        return self._call("POST", path, {"arguments": []}, authorized=False)[0]

    def _call(
        self, method: str, path: str, content: object = None, *, authorized: bool = True
    ) -> tuple[int, str]:
        headers = {"Content-Type": "application/json"}
        if authorized:
            headers |= {
                "Authorization": f"Bearer {self._token}",
                "Cookie": "_mitmproxy_xsrf=0123456789abcdef",
                "X-XSRFToken": "0123456789abcdef",
            }
        connection = http.client.HTTPConnection(*self._address, timeout=20)
        try:
            body = None if content is None else json.dumps(content)
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()
