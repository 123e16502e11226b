"""The instrumented speculative engine: draft, verify, commit, and a StepRecord for every round."""
