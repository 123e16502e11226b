"""Rounds as straight lines of device work: captured once as a CUDA graph, replayed, read every few rounds."""
