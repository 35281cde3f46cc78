"""What runs inside mitmproxy: the script, its hooks, reading a flow, and the command line."""
