"""Program -> Program: one file per rewrite, and what they share in ``infra``."""

from offramp.passes.canonicalize import Canonicalize
from offramp.passes.infra.contract import Pass, PassResult
from offramp.passes.infra.pipeline import apply
from offramp.passes.insert_acm import InsertAcm
from offramp.passes.insert_adapter import InsertAdapter
from offramp.passes.insert_cache import InsertCache
from offramp.passes.insert_exits import InsertExits
from offramp.passes.insert_scores import InsertScores
from offramp.passes.remove_exits import RemoveExits
from offramp.passes.split_modalities import SplitModalities
from offramp.passes.truncate import Truncate

__all__ = [
    "Canonicalize",
    "InsertAcm",
    "InsertAdapter",
    "InsertCache",
    "InsertExits",
    "InsertScores",
    "Pass",
    "PassResult",
    "RemoveExits",
    "SplitModalities",
    "Truncate",
    "apply",
]
