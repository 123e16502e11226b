"""Random numbers by counter, and draws that use them: reference.py says what, cpu.c says how fast."""
