"""Whether ONNX Runtime's products in 8 bits overflow on this processor: x86 without VNNI adds pairs in 16 bits.

It has sums that do not; they take up to 1.3 of the time there, and three times as long where the processor has VNNI. So
what a processor does is asked, not what it is.
"""

from __future__ import annotations

import numpy as np
import onnxruntime as ort

EXACT = "session.x64quantprecision"  # the option that asks for sums which do not overflow

#: ``c = MatMulInteger(a, b)``, uint8 and int8: an ONNX file.
PRODUCT = bytes.fromhex(
    "08083a3e0a180a01610a0162120163220d4d61744d756c496e7465676572120167"
    "5a090a016112040a0208025a090a016212040a02080362090a016312040a02080642040a00100a"
)

_found: bool | None = None


def overflows(options: ort.SessionOptions) -> bool:
    """Whether a session with such options loses the greatest sums; what the first call has found holds for all."""
    global _found
    if _found is None:
        session = ort.InferenceSession(PRODUCT, options, providers=["CPUExecutionProvider"], enable_fallback=0)
        a, b = np.full((4, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
        (made,) = session.run(None, {"a": a, "b": b})
        _found = not np.array_equal(made, a.astype(np.int32) @ b.astype(np.int32))
    return _found
