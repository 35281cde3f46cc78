"""The `artifactapi` command: click commands that run mitmproxy or read the log."""
