"""What the command line makes of a saved directory, and what transformers does with the same inputs."""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

import wave
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import directories
import numpy as np
import pytest
import torch
import transformers

import offramp
import offramp.passes.default
from offramp.cli import main

TOLERANCE = 1e-4
RATE = 16000


@dataclass
class Case:
    """A directory that was exported: the bundle, and the same model in transformers."""

    directory: directories.Directory
    folder: Path
    bundle: Path
    model: Any
    files: Path
    program: Any  # as captured
    cached: Any  # what `with_caches` made of it

    @property
    def tokenizer(self) -> Any:
        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def features(self, kind: str) -> Any:
        loader = transformers.AutoFeatureExtractor if kind == "audio" else transformers.AutoImageProcessor
        return loader.from_pretrained(self.folder)

    def arguments(self, rows: int) -> list[str]:
        """What the command line is given: rows of text, and files."""
        found = []
        for kind in self.directory.given:
            if kind == "features":
                for name, value in self.inputs(rows).items():
                    np.save(self.files / f"{name}.npy", value.numpy())
                    found += ["--input", f"{name}={self.files / name}.npy"]
                continue
            for row in range(rows):
                if kind == "text":
                    found += ["--text", directories.TEXTS[row]]
                elif kind == "pair":
                    found += ["--pair", directories.TEXTS[-1 - row]]
                else:
                    found += [f"--{kind}", str(self.files / f"{kind}{row}.{'wav' if kind == 'audio' else 'png'}")]
        return found

    def inputs(self, rows: int) -> Mapping[str, Any]:
        """The same as tensors, by transformers' own processors."""
        found: dict[str, Any] = {}
        given = self.directory.given
        if "text" in given:
            texts = list(directories.TEXTS[:rows])
            pairs = [directories.TEXTS[-1 - row] for row in range(rows)] if "pair" in given else None
            if self.directory.task.endswith("(chat)"):
                texts = [self._chat(text) for text in texts]
                found |= self.tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
            else:
                found |= self.tokenizer(texts, pairs, padding=True, return_tensors="pt")
        if {"audio", "features"} & set(given):
            sounds = [sound(row) for row in range(rows)]
            made = self.features("audio")(sounds, sampling_rate=RATE, return_tensors="pt")
            found |= {name: value if value.is_floating_point() else value.long() for name, value in made.items()}
        if "image" in given:
            found |= self.features("image")([picture(row) for row in range(rows)], return_tensors="pt")
        return found

    def _chat(self, text: str) -> str:
        message = [{"role": "user", "content": text}]
        return str(self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def sound(row: int) -> np.ndarray[Any, Any]:
    """Some tenths of a second of noise and a tone, float32, as a file of 16 bits holds it."""
    random = np.random.default_rng(row)
    times = np.arange(6000) / RATE
    wave_ = 0.4 * np.sin(2 * np.pi * (220 + 110 * row) * times) + random.standard_normal(times.size) * 0.1
    return (np.round(wave_ * 20000) / 32768).astype(np.float32)


def picture(row: int) -> Any:
    from PIL import Image

    random = np.random.default_rng(row)
    return Image.fromarray(random.integers(0, 255, (37 + 9 * row, 50, 3), dtype=np.uint8))


def files(folder: Path) -> Path:
    """Sounds and pictures for two or three rows."""
    folder.mkdir()
    for row in range(3):
        with wave.open(str(folder / f"audio{row}.wav"), "wb") as stream:
            stream.setnchannels(1)
            stream.setsampwidth(2)
            stream.setframerate(RATE)
            stream.writeframes((sound(row) * 32768).round().astype("<i2").tobytes())
        picture(row).save(folder / f"image{row}.png")
    return folder


def exported(name: str, root: Path) -> Case:
    """The directory written into ``root`` and exported with the command line's defaults."""
    directory = directories.DIRECTORIES[name]
    directory.make(root / "saved")
    with pytest.MonkeyPatch.context() as patch:
        programs = _recorded(patch, offramp, "capture")
        cached = _recorded(patch, offramp.passes.default, "with_caches")
        status = main(["export", f"hf:{root / 'saved'}", "-o", str(root / "bundle.offramp")])
    assert status == 0, f"offramp export ended with {status}"
    config = transformers.AutoConfig.from_pretrained(root / "saved")
    model = getattr(transformers, config.architectures[0]).from_pretrained(root / "saved").eval()
    return Case(
        directory, root / "saved", root / "bundle.offramp", model, files(root / "files"), programs[0], cached[0]
    )


def _recorded(patch: pytest.MonkeyPatch, owner: Any, name: str) -> list[Any]:
    """What a function returns from here on, call by call."""
    function, found = getattr(owner, name), list[Any]()

    def recording(*args: Any, **kwargs: Any) -> Any:
        found.append(function(*args, **kwargs))
        return found[-1]

    patch.setattr(owner, name, recording)
    return found


def run_error(case: Case, rows: int, out: Path) -> float:
    """The largest error of what ``offramp run`` writes, relative to the scale of what transformers gives.

    Infinite where an output is missing or has another shape.
    """
    assert main(["run", str(case.bundle), *case.arguments(rows), "-o", str(out)]) == 0
    with torch.no_grad():
        expected = case.model(**case.inputs(rows))
    worst = 0.0
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            wanted = value.numpy()
            found = np.load(out / f"{name}.npy")
            if found.shape != wanted.shape:
                return float("inf")
            worst = max(worst, float(np.abs(found - wanted).max()) / max(1.0, float(np.abs(wanted).max())))
    return worst


def generated(case: Case, chain: Any, rows: int, beams: int | None) -> tuple[list[list[int]], list[list[int]]]:
    """New tokens of each row: the bundle's, and those of ``model.generate`` with the directory's own settings."""
    inputs = case.inputs(rows)
    asked = dict(case.directory.asked)
    with torch.no_grad():
        whole = case.model.generate(**inputs, **asked, **({} if beams is None else {"num_beams": beams}))
    decodes = "input_ids" in inputs and not case.model.config.is_encoder_decoder
    start = inputs["input_ids"].shape[1] if decodes else 0
    made = chain.generate(_given(chain, inputs), **asked, **({} if beams is None else {"beams": beams}))
    return [row.tolist() for row in made.tokens], [_ended(case, row[start:].tolist(), decodes) for row in whole]


def _given(chain: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of the bundle: rows of tokens without their padding where they are prompts, arrays else."""
    (tokens, *_) = chain.manifest.cache.tokens
    found: dict[str, Any] = {name: inputs[name].numpy() for name in chain.inputs if name in inputs}
    if tokens in found:
        masks = inputs["attention_mask"].numpy().astype(bool)
        found[tokens] = [row[mask].tolist() for row, mask in zip(found[tokens], masks, strict=True)]
    return found


def _ended(case: Case, row: list[int], prompted: bool) -> list[int]:
    """New tokens up to and with the first that ends the row, without the start that transformers may put before."""
    config = case.model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    starts = (config.decoder_start_token_id, case.model.config.get_text_config(decoder=True).bos_token_id)
    if not prompted and row[0] in starts:
        row = row[1:]
    stops = [place for place, token in enumerate(row) if token in ends]
    return row[: stops[0] + 1] if stops else row
