"""Stand-alone scripts that run other engines at their best, each in an environment of its own that has nothing of ours."""
