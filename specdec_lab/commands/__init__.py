"""The verbs that the shell and the notebook share: one parser, and per verb a handler that calls what a user could call.

Nothing heavy is loaded before a verb runs: help and completion come from the parser alone.
"""
