"""Program -> bundle: partition, lowering to ONNX, one weights file, manifest, validation against torch."""

from offramp.export.assemble import save
from offramp.export.partition import partition
from offramp.export.validation import validate

__all__ = ["partition", "save", "validate"]
