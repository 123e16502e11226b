"""The stages: one module each, whose `stage(context)` yields rows. plan.py lists them."""
