"""Tokens drawn from rows of logits with noise by counter: reference.py says what, gpu.py how fast."""
