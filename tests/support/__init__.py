"""What the tests stand on: an upstream, a wire, a proxy and clients that can fail in every way."""
