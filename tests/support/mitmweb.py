"""Speak to mitmweb's own interface over HTTP, with its token."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import parse_qs, urlsplit


class WebInterface:
    """Options and commands of a running mitmweb.

    Args:
        url: Of its page, with the token.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = (parts.hostname or "", parts.port or 80)
        self._token = parse_qs(parts.query)["token"][0]

    def options(self) -> dict[str, dict[str, Any]]:
        """All options by name, each with its value and help."""
        _, found = self._call("GET", "/options")
        options: dict[str, dict[str, Any]] = json.loads(found)
        return options

    def get(self, path: str, *, authorized: bool = True) -> tuple[int, str]:
        """Status and text of a page."""
        return self._call("GET", path, authorized=authorized)

    def set_options(self, **values: object) -> tuple[int, str]:
        """Change options; status and text of the answer."""
        return self._call("PUT", "/options", values)

    def status(self) -> dict[str, Any]:
        """What the command artifactapi.status says."""
        code, found = self._call("POST", "/commands/artifactapi.status", {"arguments": []})
        assert code == 200, found
        value: dict[str, Any] = json.loads(json.loads(found)["value"])
        return value

    def post(self, path: str) -> int:
        """The status of a POST that needs no more than its path."""
        return self._call("POST", path, {})[0]

    def post_without_token(self, path: str) -> int:
        """The status a stranger gets."""
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
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()
