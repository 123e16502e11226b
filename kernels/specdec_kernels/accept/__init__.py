"""Which drafted tokens the target accepts, chains and trees: reference.py says what, gpu.py how fast."""
