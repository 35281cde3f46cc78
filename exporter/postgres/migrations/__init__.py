"""SQL that brings an older schema to the next version, one file for each."""
