"""A model becomes a Program: capture, canonical form, token axes, attention sites, stacks."""

from offramp.program.attention import AttentionSite, attention_sites
from offramp.program.axes import Axes
from offramp.program.capture import capture
from offramp.program.program import Exit, Program
from offramp.program.stacks import Stack

__all__ = ["AttentionSite", "Axes", "Exit", "Program", "Stack", "attention_sites", "capture"]
