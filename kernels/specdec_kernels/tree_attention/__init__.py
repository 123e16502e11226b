"""Attention of a few queries over a long prefix and a masked corner: reference.py says what, cpu.c says how fast."""
