"""A race: our engine and others continue the same prompts, side by side, in the same process where that is possible.

Nothing is timed before its tokens were checked, prompts are read once, and every number keeps what it depends on. Reading
order: peer.py (what a peer is), ours.py, hf.py, continuous.py and process.py (the peers), gate.py (who may be timed),
runner.py (in which order), report.py (what is said). Not known here: where results are kept.
"""
