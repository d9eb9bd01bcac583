"""What capture finds in decoders and encoder-decoders: the same numbers, their stacks with roles, their axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoders
import numpy as np
import pytest
import shared
import torch
from architectures import BLOCKS
from breadth import slow_but
from torch import Tensor, nn

import offramp
from offramp.errors import CaptureError, PassError
from offramp.passes import apply
from offramp.passes.caches.chunks import cached_stacks
from offramp.program import Program, capture
from offramp.program.analysis.attention_search import attention_sites
from offramp.program.forward import named_outputs
from offramp.program.graph import expression, placeholders, shape
from offramp.program.program import evaluate

FACTORIES = {**decoders.REQUIRED, **decoders.OTHERS, **decoders.REFUSED}
KINDS = (
    *("gpt2", "llama", "whisper", "triangle", "causal_flag", "cross_first"),
    *decoders.REFUSED,
)
# The rest of OTHERS differ from these in weights only, as far as stacks go.
CHECKED = (
    *decoders.REQUIRED,
    *("gpt2_eager", "opt_masked", "t5_masked", "falcon", "bloom", "gpt_neo", "gemma2", "mixtral", "gpt_oss"),
    *(
        "deepseek_v3",
        "phi3_longrope",
        "speech_to_text",
        "relative_buckets",
        "mixture_of_experts",
        "counted_positions",
        "time_first",
    ),
    *("looped_decoder", "cross_first", *decoders.REFUSED),
)


def built(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    try:
        return FACTORIES[name]()
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        pytest.skip("transformers is not installed")


def assert_eager(program: Program, module: nn.Module, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        found, expected = program.module(**inputs), named_outputs(module(**inputs))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", slow_but(KINDS, CHECKED))
def test_stacks_and_axes(name: str) -> None:
    module, inputs = built(name)
    program = shared.captured(FACTORIES[name])
    assert {stack.name: (stack.role, stack.blocks) for stack in program.stacks.values()} == decoders.STACKS[name]
    assert_eager(program, module, inputs)
    assert_eager(program, module, decoders.resized(name, inputs))
    _assert_cached(name, program)

    nodes = placeholders(program.graph)
    assert {expression(shape(node)[0]) for node in nodes.values()} == {program.axes.batch}
    assert program.axes.names[program.axes.batch] == "batch"
    ids = {key: expression(shape(nodes[key])[1]) for key in inputs if inputs[key].dtype == torch.int64}
    assert set(ids.values()) <= set(program.axes.tokens)
    assert all(program.axes.names[size].startswith("tokens") for size in program.axes.tokens)


def _assert_cached(name: str, program: Program) -> None:
    """``insert-cache`` keeps keys and values of every decoder block, and checks itself in chunks; or refuses."""
    if name in decoders.REFUSED:
        with pytest.raises(PassError, match=r"tokens.*(decoders|modeling_lfm2)\.py"):
            apply(program, "insert-cache")
        return
    made = shared.cached(FACTORIES[name])
    causal = [stack for stack in program.stacks.values() if stack.role == "decoder"]
    assert cached_stacks(made) == {stack.name for stack in causal}
    assert made.cache is not None
    kept = [key for key in made.cache.buffers if key.startswith("key")]
    assert len(kept) >= sum(stack.blocks for stack in causal)


@pytest.mark.slow
def test_exits_of_a_hybrid_are_the_model_with_fewer_layers(tmp_path: Path) -> None:
    module, inputs = built("lfm2")
    offramp.save(apply(shared.captured(FACTORIES["lfm2"]), "insert-exits"), tmp_path / "hybrid.offramp")
    chain = offramp.load(tmp_path / "hybrid.offramp")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    model: Any = module.model
    layers = model.layers
    for after in range(1, BLOCKS + 1):
        model.layers = layers[: 2 * after]
        with torch.no_grad():
            wanted = named_outputs(module(**inputs))["logits"].numpy()
        found = chain.run(arrays, offramp.Depth(after)).outputs["logits"]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def reach(program: Program) -> list[int]:
    """How many keys the last query of every attention sees by its masks."""
    counts = []
    for site in attention_sites(program.graph):
        values = evaluate(program.graph_module, [mask.node for mask in site.masks], program.example_inputs)
        seen = torch.ones(1, dtype=torch.bool)
        for mask in site.masks:
            seen = seen & mask.visible(values[mask.node])
        counts.append(int(seen.reshape(-1, seen.shape[-1])[-1].sum()))
    return counts


@pytest.mark.parametrize(
    ("name", "keys"), [("mistral", [4, 4, 4, 4]), pytest.param("gemma2", [4, 9, 4, 9], marks=pytest.mark.slow)]
)
def test_windows_are_shorter_than_the_text(name: str, keys: list[int]) -> None:
    built(name)
    assert reach(shared.captured(FACTORIES[name])) == keys


@pytest.mark.parametrize("name", slow_but(("led",), decoders.NOT_CAPTURED))
def test_what_torch_export_refuses(name: str) -> None:
    factory, reason = decoders.NOT_CAPTURED[name]
    pytest.importorskip("transformers")
    module, inputs = factory()
    with torch.no_grad():
        assert named_outputs(module(**inputs))
    with pytest.raises(CaptureError) as caught:
        capture(module, inputs)
    assert reason in str(caught.value)
    assert caught.value.hint is not None
