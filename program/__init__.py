"""A model becomes a Program: capture, canonical form, token axes, attention sites, stacks."""

from offramp.program.analysis.attention import AttentionSite
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.analysis.stacks import Stack
from offramp.program.analysis.token_axes import Axes
from offramp.program.capture import capture
from offramp.program.exit import Exit
from offramp.program.program import Program
from offramp.program.record import Record

__all__ = ["AttentionSite", "Axes", "Exit", "Program", "Record", "Stack", "attention_sites", "capture"]
