"""Attention kernels, one folder per operation: reference.py says what, the others say how fast."""
