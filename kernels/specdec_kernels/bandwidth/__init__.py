"""What a machine can do at most: memory streams, a clock's tick, an empty launch: reference.py says what, gpu.py how fast."""
