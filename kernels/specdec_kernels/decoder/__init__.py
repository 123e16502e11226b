"""One forward of a Llama-style decoder for a few tokens per sequence: reference.py says what, cpu.c says how fast."""
