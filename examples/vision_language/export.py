"""Make a bundle of the trained model, to ask about images of easy-VQA's kind from the command line.

    python -m examples.vision_language.export answers.offramp [--tokens token|group] [--weights FILE]
    offramp run answers.offramp --image circle.png --text "what color is the circle?" --figure left.png \\
        --policy "confidence:0.98,measure=cosine"

The weights are what ``python -m examples.vision_language.train`` left: ``joint``, 8 epochs, an hour on two
cores. Those of ``--form separate`` (58 minutes) lie beside them, for the benchmark. Every patch and word leaves the
encoder by itself, or all patches and all words together (``group``).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tokenizers import Tokenizer

import offramp
from examples.vision_language.model import PAD, SIDE
from examples.vision_language.train import GENERATION, program
from offramp.program import Program
from offramp.training.weights import load_weights

HERE = Path(__file__).parent
WEIGHTS, TOKENIZER = HERE / "joint.safetensors", HERE / "tokenizer.json"
SHA256 = {
    "joint": "d752978243410a4064ed92eff8cb3805afc2c71735252730fa1b379bcff2b2ee",
    "separate": "13b6f6749ac2d86412991905671b8337c9194ecbb3be30680851e843f0cb566f",
}
PREPROCESSING = {
    "image": {"rgb": True, "height": SIDE, "width": SIDE, "resample": "bilinear", "scale": 1 / 127.5, "offset": -1.0},
    "text": {"pad": PAD},
}


def trained(tokens: str = "group", weights: Path = WEIGHTS) -> Program:
    """The trained model with exits and caches."""
    made = program(Tokenizer.from_file(str(TOKENIZER)).get_vocab_size(), tokens=tokens)
    load_weights(made, weights)
    return offramp.apply(made.without_dropout(), "insert-cache")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--tokens", choices=("token", "group"), default="token", help="what leaves together (token)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    args = parser.parse_args()
    offramp.save(
        trained(args.tokens, args.weights),
        args.bundle,
        generation=GENERATION,
        preprocessing=PREPROCESSING,
        files=[TOKENIZER],
    )
    print(offramp.load(args.bundle))


if __name__ == "__main__":
    main()
