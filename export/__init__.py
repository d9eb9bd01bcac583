"""Program -> bundle: partition, lowering to ONNX, one weights file, manifest, validation against torch."""

from offramp.export.bundle import save
from offramp.export.partition import partition
from offramp.export.validate import validate

__all__ = ["partition", "save", "validate"]
