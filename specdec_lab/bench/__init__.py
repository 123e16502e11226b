"""What is done with an engine: profile it, race it, measure its instrumentation, examine the machine, run the demo.

Public functions that the magics and the command line call, and that anybody may call by hand. Nothing here parses or
prints; importing this package loads nothing heavy.
"""
