"""Parse advisories and compare versions. Knows no database and no mitmproxy."""
