"""The GPU run: one script of at most ten minutes, in stages that run alone, are recorded row by row and resume.

    specdec-lab gpu                 all stages on this machine's GPU
    specdec-lab gpu kernels rounds  these
    specdec-lab gpu --rehearse      all of them with tiny shapes on the CPU, labelled, to see that they run

`plan` lists the stages, `run` runs them, `ledger` keeps their rows, `table` says what came out. Importing this package loads
nothing heavy.
"""
