"""Which parts of which sequences attention must read: reference.py says what, gpu.py says it on the device."""
