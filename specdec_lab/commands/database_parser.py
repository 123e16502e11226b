"""The part of the parser below `db`. Building it loads nothing heavy."""

from __future__ import annotations

from .parser import Verbs, offer_json

ACTIONS = ("which", "ls", "merge", "verify")


def add_db(verbs: Verbs) -> None:
    """The verb."""
    verb = verbs.add(
        "db", "say which tuning database is used and what it holds, join databases, verify a policy", "which", "ls",
        "merge runs/tune-prose-1a2b3c4d-*of8 --into tuning_db --out policy.json", "verify policy.json", handler="databases:db",
    )
    verb.add_argument("action", choices=ACTIONS,
                      help="which: where measurements go; ls: what is there; merge: add what others have measured; verify: "
                           "rebuild a policy from its evidence and compare the bytes")
    verb.add_argument("sources", nargs="*", metavar="PATH",
                      help="of merge: databases, or run folders of shards; of verify: a policy")
    verb.add_argument("--db", metavar="DIR",
                      help="of which, ls and verify: the database (default: ./tuning_db, else the user's own)")
    verb.add_argument("--into", metavar="DIR", help="of merge: the database that gets the measurements (default: as --db)")
    verb.add_argument("--out", metavar="FILE",
                      help="of merge: write the policy that the shards in these run folders make together")
    offer_json(verb)
