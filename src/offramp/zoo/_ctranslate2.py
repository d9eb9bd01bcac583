"""Reads CTranslate2's ``model.bin`` and gives its Whisper the names of transformers.

The layout is the one of ``ModelSpec.save`` in CTranslate2 (python/ctranslate2/specs/model_spec.py), little endian: the
version of the format, the name of the specification, its revision; the number of variables, and of each its name,
rank, sizes, number of its dtype, count of bytes, bytes; the number of aliases, and of each its name and the
variable's. A string is its length (16 bits), then its bytes, the last of which is a zero.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from offramp.zoo._package import ZooError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

VERSION = 6
_DTYPES = {0: "float32", 1: "int8", 2: "int16", 3: "int32", 4: "float16"}
_NORM = {"weight": "gamma", "bias": "beta"}
_LINEAR = {"weight": "weight", "bias": "bias"}


def read_model(data: bytes) -> dict[str, NDArray[Any]]:
    """All variables by name, float16 as float32, others as stored; aliases share the array of their variable.

    Raises `ZooError`: another version of the format, bytes that end too early or too late, a dtype that is not read
    (bfloat16), or weights in int8, which would need their scales.
    """
    reader = _Reader(data)
    version = reader.number("<I")
    if version != VERSION:
        raise ZooError(f"CTranslate2's model.bin has version {version} of the format, expected {VERSION}")
    reader.text()
    reader.number("<I")
    variables = dict(reader.variable() for _ in range(reader.number("<I")))
    for _ in range(reader.number("<I")):
        alias, name = reader.text(), reader.text()
        variables[alias] = variables[name]
    if reader.place != len(data):
        raise ZooError(f"CTranslate2's model.bin has {len(data) - reader.place} bytes behind its last variable")
    return variables


def whisper_state(variables: dict[str, NDArray[Any]]) -> dict[str, Tensor]:
    """The float32 state dict of a ``WhisperForConditionalGeneration``, whose head is tied to its embeddings.

    CTranslate2 stacks the projections that read the same input: q, k, v in self-attention, k, v in cross-attention.
    transformers' k has no bias; CTranslate2 stores zeros for it. Raises `ZooError` where a variable is missing, or
    where k has a bias after all.
    """
    import torch

    state: dict[str, NDArray[Any]] = {}
    try:
        for side in ("encoder", "decoder"):
            state |= _side(variables, side)
    except KeyError as error:
        raise ZooError(f"CTranslate2's model.bin is no Whisper: it has no variable {error}") from error
    state["model.decoder.embed_tokens.weight"] = variables["decoder/embeddings/weight"]
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
    return tensors | {"proj_out.weight": tensors["model.decoder.embed_tokens.weight"]}


def _side(variables: dict[str, NDArray[Any]], side: str) -> dict[str, NDArray[Any]]:
    """The weights of the encoder or of the decoder, its embeddings of tokens left out."""

    def take(target: str, source: str, parts: dict[str, str]) -> None:
        state.update({f"{target}.{part}": variables[f"{source}/{stored}"] for part, stored in parts.items()})

    def split(target: str, source: str, *projections: str) -> None:
        for part in _LINEAR:
            for name, value in zip(projections, np.split(variables[f"{source}/{part}"], len(projections)), strict=True):
                state[f"{target}.{name}.{part}"] = value

    state: dict[str, NDArray[Any]] = {}
    root = f"model.{side}"
    state[f"{root}.embed_positions.weight"] = variables[f"{side}/position_encodings/encodings"]
    take(f"{root}.layer_norm", f"{side}/layer_norm", _NORM)
    if side == "encoder":
        for convolution in ("conv1", "conv2"):
            take(f"{root}.{convolution}", f"{side}/{convolution}", _LINEAR)
    for index in range(layers(variables, side)):
        target, source = f"{root}.layers.{index}", f"{side}/layer_{index}"
        take(f"{target}.self_attn_layer_norm", f"{source}/self_attention/layer_norm", _NORM)
        split(f"{target}.self_attn", f"{source}/self_attention/linear_0", "q_proj", "k_proj", "v_proj")
        take(f"{target}.self_attn.out_proj", f"{source}/self_attention/linear_1", _LINEAR)
        if side == "decoder":
            take(f"{target}.encoder_attn_layer_norm", f"{source}/attention/layer_norm", _NORM)
            take(f"{target}.encoder_attn.q_proj", f"{source}/attention/linear_0", _LINEAR)
            split(f"{target}.encoder_attn", f"{source}/attention/linear_1", "k_proj", "v_proj")
            take(f"{target}.encoder_attn.out_proj", f"{source}/attention/linear_2", _LINEAR)
        take(f"{target}.final_layer_norm", f"{source}/ffn/layer_norm", _NORM)
        take(f"{target}.fc1", f"{source}/ffn/linear_0", _LINEAR)
        take(f"{target}.fc2", f"{source}/ffn/linear_1", _LINEAR)
    for name in [name for name in state if name.endswith(".k_proj.bias")]:
        if state.pop(name).any():
            raise ZooError(f"{name} is not zero, and transformers' Whisper has no such bias")
    return state


def layers(variables: dict[str, NDArray[Any]], side: str) -> int:
    """How many blocks ``"encoder"`` or ``"decoder"`` has."""
    return len({name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")} - {"layer_norm"})


class _Reader:
    """A place in bytes that moves on with everything that is read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.place = data, 0

    def take(self, count: int) -> memoryview:
        if self.place + count > len(self.data):
            raise ZooError(
                f"CTranslate2's model.bin ends early: {count} bytes at {self.place}, and there are {len(self.data)}"
            )
        self.place += count
        return memoryview(self.data)[self.place - count : self.place]

    def number(self, layout: str) -> int:
        return int(struct.unpack(layout, self.take(struct.calcsize(layout)))[0])

    def text(self) -> str:
        return bytes(self.take(self.number("<H"))).rstrip(b"\0").decode()

    def variable(self) -> tuple[str, NDArray[Any]]:
        name = self.text()
        shape = [self.number("<I") for _ in range(self.number("<B"))]
        dtype, content = self.number("<B"), self.take(self.number("<I"))
        if dtype not in _DTYPES or (dtype == 1 and shape):
            stored = _DTYPES.get(dtype, f"dtype {dtype}")
            raise ZooError(f"{name} of CTranslate2's model.bin is {stored}, expected weights in float16 or float32")
        array = np.frombuffer(content, _DTYPES[dtype]).reshape(shape)
        return name, array.astype(np.float32) if dtype == 4 else array
