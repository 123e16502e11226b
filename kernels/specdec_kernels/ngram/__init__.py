"""What followed the latest earlier occurrence of a text's end: reference.py says what, gpu.py how fast."""
