"""Where prompts come from: the user's text or file, shipped held-out text of an exact length, or needles hidden in it.

A workload is prompts as tokens together with how to continue them. Not known here: models, engines, views.
"""

from .held_out import CONTINUATION_TOKENS as CONTINUATION_TOKENS
from .held_out import HELD_OUT as HELD_OUT
from .held_out import HeldOutText as HeldOutText
from .held_out import read_held_out as read_held_out
from .kinds import KINDS as KINDS
from .kinds import held_out as held_out
from .needle import asked_later as asked_later
from .needle import needles as needles
from .needle import retrieved_share as retrieved_share
from .prompts import VERIFIERS as VERIFIERS
from .prompts import Sampling as Sampling
from .prompts import Tokenizer as Tokenizer
from .prompts import Tokens as Tokens
from .prompts import Workload as Workload
from .prompts import from_file as from_file
from .prompts import from_text as from_text
from .prompts import random_context as random_context
