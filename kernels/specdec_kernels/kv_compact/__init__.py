"""The accepted nodes' keys and values moved next to their root: reference.py says what, gpu.py how fast."""
