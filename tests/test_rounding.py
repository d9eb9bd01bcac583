"""The rounding of weights of 4 bits: errors count by the features that they meet, and are made up for by others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, DefaultWeightOnlyQuantizer
from torch import Tensor, nn

import offramp
from offramp.bundle.whole import divided
from offramp.export.observe import observed
from offramp.export.quantize import quantized
from offramp.export.rounding import GROUP, Moments, Roundings, rounded

FEATURES, WIDE = 256, 64


def _product(weight: NDArray[np.float32], extra: str = "") -> onnx.ModelProto:
    features, count = weight.shape
    model = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["": 23]> g (float[N, {features}] x) => (float[N, {count}] y)'
        f"<float[{features}, {count}] w> {{ y = MatMul(x, w) {extra} }}"
    )
    del model.graph.initializer[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def _run(model: onnx.ModelProto, x: NDArray[np.float32]) -> NDArray[np.float32]:
    (found,) = onnxruntime.InferenceSession(model.SerializeToString()).run(["y"], {"x": x})
    return np.asarray(found, np.float32)


def _inputs(random: np.random.Generator, rows: int = 64) -> NDArray[np.float32]:
    """Features of very different sizes, some of which go together, as transformers have them."""
    sizes = np.exp(random.normal(0, 1.5, FEATURES))
    few = random.normal(0, 1, (rows, 8)) @ np.random.default_rng(0).normal(0, 1, (8, FEATURES))
    return ((random.normal(0, 1, (rows, FEATURES)) + few) * sizes).astype(np.float32)


def _weight(random: np.random.Generator) -> NDArray[np.float32]:
    return random.standard_t(4, (FEATURES, WIDE)).astype(np.float32)


def _moments(x: NDArray[np.float32]) -> Moments:
    parts = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(len(x), -1, GROUP)
    return Moments(np.einsum("tgi,tgj->gij", parts, parts), len(x))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alone", [True, False], ids=["by sizes", "by pairs too"])
def test_products_are_nearer(seed: int, alone: bool) -> None:
    random = np.random.default_rng(seed)
    x, weight = _inputs(random, 64 if alone else 288), _weight(random)
    moments, other = _moments(x[32:]), x[:32]  # than those that it is rounded by
    if alone:
        moments = Moments(moments.sums * np.eye(GROUP, dtype=np.float32), moments.tokens)
    errors = []
    for chosen in (None, Roundings({"f": {"x": moments}}).of("f")):
        found = _run(quantized(_product(weight), "int4", {}, chosen), other)
        errors.append(float(np.square(found - other @ weight).sum()))
    assert errors[1] < (0.8 if alone else 0.5) * errors[0]


@given(
    seed=st.integers(0, 1000),
    features=st.sampled_from([16, 96, 128, 200, 256]),
    block=st.sampled_from([16, 32, 128]),
    zeros=st.booleans(),
)
def test_a_rounded_weight_is_what_the_quantizer_makes_of_it(seed: int, features: int, block: int, zeros: bool) -> None:
    """It finds the very steps: the greatest of each block has -8 of them."""
    random = np.random.default_rng(seed)
    weight = random.standard_t(3, (features, 8)).astype(np.float32)
    weight[: features // 2] *= not zeros
    made = rounded(weight, _moments(random.normal(0, 1, (20, features)).astype(np.float32)), block)
    found = made.weight()
    assert found.shape == weight.shape
    config = DefaultWeightOnlyQuantConfig(block, is_symmetric=True, bits=4)
    packed, scales, _ = DefaultWeightOnlyQuantizer(config).qbits_block_quant(found)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(8, -1, block).astype(np.float32) - 8
    again = (codes * scales[..., None]).reshape(8, -1)[:, :features].T
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(scales.T, made.steps.numpy())


def test_a_weight_that_others_read_too_stays() -> None:
    random = np.random.default_rng(0)
    weight, x = _weight(random), _inputs(random, 4)
    model = _product(weight, "z = Identity(w)")
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info("z"))
    made = quantized(model, "int4", {}, Roundings({"f": {"x": _moments(x)}}).of("f"))
    (z,) = onnxruntime.InferenceSession(made.SerializeToString()).run(["z"], {"x": x})
    np.testing.assert_array_equal(z, weight)


WHOLE = (FEATURES // GROUP, GROUP, GROUP)


@pytest.mark.parametrize(
    "sums",
    [None, np.zeros(WHOLE), np.full(WHOLE, np.nan), np.ones((1, GROUP, GROUP))],
    ids=["none", "zeros", "nan", "short"],
)
def test_without_moments_a_weight_is_left_to_the_quantizer(sums: NDArray[np.float32] | None) -> None:
    weight = _weight(np.random.default_rng(0))
    assert Roundings({"f": {} if sums is None else {"x": Moments(sums, 9)}}).of("f")("x", weight, 128) is weight


def test_the_same_weights_stay_one_array() -> None:
    random = np.random.default_rng(0)
    weight = _weight(random)
    roundings = Roundings({name: {"x": _moments(_inputs(random))} for name in ("a", "b")})
    np.testing.assert_array_equal(roundings.of("a")("x", weight, 128), roundings.of("b")("x", weight.copy(), 128))


def test_roundings_are_of_a_shape() -> None:
    """Weights of the same bytes, all zero, are not the same ones."""
    sums = {"x": np.ones(WHOLE, np.float32), "y": np.ones((1, GROUP, GROUP), np.float32)}
    rounding = Roundings({"f": {name: Moments(each, 9) for name, each in sums.items()}}).of("f")
    for name, shape in (("x", (256, 64)), ("y", (64, 256))):
        assert rounding(name, np.zeros(shape, np.float32), 128).shape == shape


class Steep(nn.Module):
    """Two blocks whose features are of very different sizes, and some of whose weights are large."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, FEATURES)
        layer = nn.TransformerEncoderLayer(FEATURES, 4, 2 * FEATURES, batch_first=True, dropout=0.0, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(FEATURES, 3)
        with torch.no_grad():
            for name, weight in self.encoder.named_parameters():
                if "norm" in name and "weight" in name:
                    weight.copy_(torch.exp(torch.randn(FEATURES)))
                elif weight.ndim == 2:
                    weight.copy_(0.03 * torch.distributions.StudentT(3.0).sample(weight.shape))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))  # type: ignore[no-any-return]


def test_a_bundle_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to fp32 than what is rounded to the nearest steps."""
    torch.manual_seed(0)
    program = offramp.capture(Steep().eval(), {"ids": torch.randint(50, (2, 9))})
    samples = [{"ids": np.random.default_rng(0).integers(50, size=(8, 20))}]
    found = offramp.save(program, tmp_path / "a.offramp", "int4", samples=samples, loss=1)["encoding"]
    monkeypatch.setattr(Roundings, "of", lambda self, file: lambda read, weight, block: weight)
    assert found < 0.9 * offramp.save(program, tmp_path / "b.offramp", "int4", samples=samples, loss=1)["encoding"]


class Eager(nn.Module):
    """Blocks whose attention is written out: its products are of two states, as many wide as there are tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.ModuleDict({k: nn.Linear(64, 64) for k in "qkvo"}) for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            q, k, v = (block[name](x) for name in "qkv")  # type: ignore[index]
            x = x + block["o"]((q @ k.mT / 8).softmax(-1) @ v)  # type: ignore[index]
        return x  # type: ignore[no-any-return]


@pytest.mark.parametrize("precision", ["int4", "int8", "auto"])
def test_samples_of_several_lengths(tmp_path: Path, precision: str) -> None:
    torch.manual_seed(0)
    program = offramp.capture(Eager().eval(), {"ids": torch.randint(50, (2, 9))})
    samples = [{"ids": np.random.default_rng(0).integers(50, size=(2, count))} for count in (12, 20)]
    offramp.save(program, tmp_path / "m.offramp", precision, samples=samples, loss=1)
    assert offramp.load(tmp_path / "m.offramp").run(samples[0]).outputs


def test_what_products_of_weights_read(tmp_path: Path) -> None:
    """Sums of what pairs make, of features alone, and the directory is as it was, also where a bundle does not run."""
    torch.manual_seed(0)
    model = Eager().eval()
    program = offramp.capture(model, {"ids": torch.randint(50, (2, 9))})
    offramp.save(program, tmp_path / "m.offramp")
    chain, files = offramp.load(tmp_path / "m.offramp"), sorted((tmp_path / "m.offramp").iterdir())
    ids = np.random.default_rng(0).integers(50, size=(3, 7))
    parts = divided(chain.manifest)
    found = observed(parts, tmp_path / "m.offramp", [{"ids": ids}, {"ids": ids[:, :5]}])
    assert {met.sums.shape for each in found.values() for met in each.values()} == {(1, GROUP, GROUP)}
    assert {met.tokens for each in found.values() for met in each.values()} == {36}
    with torch.no_grad():
        x = [model.embed(torch.from_numpy(some)).reshape(-1, 64) for some in (ids, ids[:, :5])]
    expected = np.pad(sum(part.T @ part for part in x).numpy(), (0, GROUP - 64))
    first = found[chain.manifest.segments["encoder.1"].file]
    assert any(np.allclose(met.sums, expected, rtol=1e-4, atol=1e-4) for met in first.values())
    assert len(first) == 2
    with pytest.raises(offramp.OfframpError):
        observed(parts, tmp_path / "m.offramp", [{"ids": ids.astype(np.float32)}])
    assert sorted((tmp_path / "m.offramp").iterdir()) == files


def test_rows_that_are_only_read_are_nearer_than_with_the_widest_range() -> None:
    table = np.random.default_rng(0).standard_t(4, (FEATURES, WIDE)).astype(np.float32)
    made = Roundings({}).alone(table, 32)
    widest = table.reshape(-1, 32, WIDE)
    step = np.take_along_axis(widest, np.abs(widest).argmax(1)[:, None], 1) / -8
    nearest = (np.clip(np.rint(widest / step), -8, 7) * step).reshape(table.shape)
    assert np.square(made - table).sum() < 0.95 * np.square(nearest - table).sum()
