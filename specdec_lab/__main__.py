"""`python -m specdec_lab VERB ...`: the same as the command `specdec-lab`."""

from .cli import main

raise SystemExit(main())
