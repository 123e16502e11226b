"""Rotary positions for queries and keys, and keys and values written to the cache: reference.py says what, gpu.py how fast."""
