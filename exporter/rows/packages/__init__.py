"""Which remote and which package a URL belongs to."""
