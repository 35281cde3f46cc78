"""Servers, proxies, clients and network faults for the tests."""
