"""The time, written into a row of a table that a number on the device names."""
