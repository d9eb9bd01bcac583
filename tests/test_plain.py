"""What people call their model: unwrapped, accepted as it is, or refused with what to try."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from offramp.check import check
from offramp.errors import CaptureError, ForwardError
from offramp.program import Program, capture
from offramp.program.unwrap import as_captured, plain, unchanged

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),  # what torch.compile itself imports, too
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # peft
]

DYNAMIC = torch.export.Dim.AUTO
IDS = torch.arange(10).reshape(2, 5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        query, key, value = self.qkv(self.norm(x)).unsqueeze(1).chunk(3, -1)
        mixed: Tensor = nn.functional.scaled_dot_product_attention(query, key, value)
        return x + self.out(mixed.squeeze(1))


class Model(nn.Module):
    """Two blocks and a head; what a config says decides what else is returned."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.config = SimpleNamespace(use_cache=True, text_config=SimpleNamespace(use_cache=True))
        self.words = nn.Embedding(10, 8)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        x = self.dropout(self.words(ids))
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        cached = self.config.use_cache or self.config.text_config.use_cache
        return {"logits": logits, **({"cache": Cache()} if cached else {})}


class Cache:
    def get_seq_length(self) -> int:
        return 0


class Anything(nn.Module):
    """A wrapper as people write them, and the name of what it wraps is its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.network(*args, **kwargs)


class Halving(nn.Module):
    """One that calls what it wraps as DataParallel does, and changes what it gives."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return {"logits": self.module(*args, **kwargs)["logits"] / 2}


def made(**options: float) -> Model:
    torch.manual_seed(0)
    return Model(**options).eval()


def exported(model: nn.Module, **inputs: Tensor) -> torch.export.ExportedProgram:
    args = () if inputs else (IDS,)
    shapes = {"ids": {0: DYNAMIC, 1: DYNAMIC}}
    with as_captured(model):
        return torch.export.export(model, args, inputs or None, dynamic_shapes=shapes)


def compiled_inside(model: Model) -> Model:
    model.blocks[0] = torch.compile(model.blocks[0])  # type: ignore[assignment]
    model.blocks[1].compile()
    model.compile()
    return model


ACCEPTED: dict[str, Callable[[], Any]] = {
    "compiled": lambda: torch.compile(made()),
    "compiled in place and inside": lambda: compiled_inside(made()),
    "data parallel": lambda: nn.DataParallel(made()),
    "compiled and data parallel": lambda: torch.compile(nn.DataParallel(made())),
    "exported": lambda: exported(made()),
    "exported by name": lambda: exported(made(), ids=IDS),
    "exported, its module": lambda: exported(made()).module(),
    "pipeline": lambda: SimpleNamespace(model=made(), tokenizer=None),
    "passes on what it is given": lambda: Anything(made()),
    "bfloat16": lambda: made().bfloat16(),
    "double": lambda: made().double(),
    "training": lambda: made(dropout=0.5).train(),
}


def right(program: Program, model: nn.Module) -> None:
    """Two blocks were found, and they compute what the model does."""
    assert [stack.blocks for stack in program.stacks.values()] == [2]
    with as_captured(model), torch.no_grad():
        torch.testing.assert_close(program.module(ids=IDS)["logits"], model(ids=IDS)["logits"], rtol=0, atol=0)


def test_a_wrapper_of_the_users_own_is_part_of_the_model() -> None:
    right(capture(Halving(made()), {"ids": IDS}), Halving(made()))


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_stands_for_a_module_is_captured(case: str) -> None:
    model = ACCEPTED[case]()
    expected = made().bfloat16().float() if case == "bfloat16" else made()
    right(capture(model, {"ids": IDS}), expected)
    right(capture(model, (IDS,)), expected)


def test_an_exported_module_of_fixed_sizes() -> None:
    model = made()
    with as_captured(model):
        fixed = torch.export.export(model, (IDS,))
    right(capture(fixed, {"ids": IDS}), model)


def test_weights_are_shared_unless_they_have_to_become_float32() -> None:
    model = made()
    assert plain(torch.compile(model)) is model
    assert capture(model, {"ids": IDS}).module.get_parameter("head.weight") is model.head.weight
    half = made().half()
    copied = plain(half)
    assert copied is not half
    assert {weight.dtype for weight in copied.parameters()} == {torch.float32}
    assert {weight.dtype for weight in half.parameters()} == {torch.float16}


def test_a_check_compares_with_the_float32_copy() -> None:
    report = check(made().bfloat16(), {"ids": IDS})
    assert report.ok, report.reason


def test_modes_settings_and_forward_are_as_they_were() -> None:
    model = made().train()
    model.blocks[0].eval()
    capture(model, {"ids": IDS})
    assert [part.training for part in (model, *model.blocks)] == [True, False, True]
    assert model.config.use_cache
    assert model.config.text_config.use_cache
    assert "forward" not in vars(model)


@dataclass(frozen=True)
class Frozen:
    use_cache: bool = True


def test_a_frozen_configuration_is_left_alone() -> None:
    model = made()
    model.config = Frozen()  # type: ignore[assignment]
    with as_captured(model):
        assert model.config.use_cache


@dataclass
class Answer:
    logits: Tensor
    loss: Tensor | None = None
    length: int = 5


class Returns(Model):
    """The model, with something else around its logits."""

    def __init__(self, around: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.around = around

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> Any:
        return self.around(super().forward(ids, bias)["logits"])


def returning(around: Callable[[Tensor], Any]) -> Model:
    torch.manual_seed(0)
    return Returns(around).eval()


@pytest.mark.parametrize(
    ("around", "names"),
    [
        (lambda logits: {"logits": logits, "length": logits.shape[1], "task": "tags", "loss": None}, ["logits"]),
        (lambda logits: Answer(logits), ["logits"]),
        (lambda logits: (logits, 0.5, {"twice": logits * 2}), ["output0", "output2.twice"]),
    ],
)
def test_numbers_and_texts_beside_tensors_are_left_out(around: Callable[[Tensor], Any], names: list[str]) -> None:
    program = capture(returning(around), {"ids": IDS})
    assert list(program.example_outputs) == names
    torch.testing.assert_close(program.module(ids=IDS), dict(program.example_outputs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("around", "reason"),
    [
        (lambda logits: (logits, Cache()), r"(?s)output1 is a Cache.*use_cache=False"),
        (lambda logits: {"logits": {1, 2}}, r"(?s)logits is a set.*tensors only"),
    ],
)
def test_other_outputs_are_refused(around: Callable[[Tensor], Any], reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        capture(returning(around), {"ids": IDS})


def quantized() -> nn.Module:
    model = made()
    model.head = torch.ao.nn.quantized.dynamic.Linear(8, 3)  # type: ignore[assignment]
    return model


def scripted_inside() -> nn.Module:
    model = made()
    model.head = torch.jit.trace(model.head, torch.ones(1, 8))
    return model


class Sharded(torch.Tensor):
    """A tensor that holds its data elsewhere, as those of distributed and quantized weights do."""

    @staticmethod
    def __new__(cls, data: Tensor) -> Sharded:
        return torch.Tensor._make_wrapper_subclass(cls, data.shape)

    def __init__(self, data: Tensor) -> None:
        self.data_elsewhere = data

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["data_elsewhere"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Sharded:
        return cls(inner["data_elsewhere"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return Sharded(args[0].data_elsewhere)


def sharded() -> nn.Module:
    model = made()
    model.words.register_buffer("table", Sharded(torch.ones(2)))
    return model


def lazy() -> nn.Module:
    model = made()
    model.head = nn.LazyLinear(3)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "scripted inside": (scripted_inside, r"(?s)traced or scripted module \(at head\).*given to torch.jit"),
    "quantized": (quantized, r"(?s)is quantized: Linear \(at head\).*before it was quantized"),
    "meta": (lambda: made().to("meta"), r"(?s)words.weight of Model has no data.*device_map=None"),
    "sharded": (sharded, r"(?s)words.table of Model is a Sharded.*sharded"),
    "lazy": (lazy, r"(?s)weight head.weight of Model has no shape.*call the model once"),
    "dropout in an export": (lambda: exported_in_training(), r"(?s)dropout switched on.*module.eval"),
    "class": (lambda: Model, r"(?s)Model is a class.*an instance"),
    "weights": (lambda: made().state_dict(), r"(?s)OrderedDict of .* items is no model.*load_state_dict"),
    "name": (lambda: "zoo:minilm", r"(?s)a str is no model.*resolve"),
    "function": (lambda: torch.relu, r"(?s)is no model.*torch.nn.Module around it"),
}


def exported_in_training() -> torch.export.ExportedProgram:
    model = made(dropout=0.5)
    model.config.use_cache = model.config.text_config.use_cache = False
    return torch.export.export(model.train(), (IDS,))


@pytest.mark.parametrize("case", REFUSED)
def test_what_hides_its_computation_is_refused(case: str) -> None:
    make, reason = REFUSED[case]
    with pytest.raises(CaptureError, match=reason):
        capture(make(), {"ids": IDS})


def test_a_model_that_does_not_run_is_not_a_matter_of_capture() -> None:
    with pytest.raises(
        ForwardError, match=r"Model does not run on .*ids \[2, 5\].*index out of range.*test_plain"
    ) as bad:
        capture(made(), {"ids": IDS + 10})
    assert bad.value.stage == "model"
    report = check(Anything(made()), {"id": IDS})
    assert (report.ok, report.stage) == (False, "model")
    assert "unexpected keyword argument 'id'" in str(report.reason)


class Traced(Model):
    """The model, which takes another way while it is traced."""

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        outputs = super().forward(ids, bias)
        return {"logits": outputs["logits"] * (1.01 if torch.compiler.is_exporting() else 1.0)}


def test_a_graph_that_differs_from_the_model_is_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(
        CaptureError, match=r"(?s)computes something else than the model: logits by .*while it is traced"
    ):
        capture(Traced(), {"ids": IDS})


def test_masked_infinities_are_no_difference() -> None:
    around = returning(lambda logits: {"logits": logits.masked_fill(logits > 0, float("-inf"))})
    assert capture(around, {"ids": IDS}).example_outputs["logits"].isinf().any()


def test_inputs_that_are_no_tensors() -> None:
    with pytest.raises(CaptureError, match=r"(?s)found \{'ids': 'list'\}.*return_tensors"):
        capture(made(), {"ids": IDS.tolist()})  # type: ignore[dict-item]
    with pytest.raises(CaptureError, match=r"(?s)found \{'ids': 'list'\}.*takes tensors only"):
        capture(made(), {"ids": [IDS, IDS]})  # type: ignore[dict-item]
    with pytest.raises(CaptureError, match=r"(?s)found \{'bias': 'bool'\}.*sets the rest itself"):
        capture(made(), {"ids": IDS, "bias": True})  # type: ignore[dict-item]
    assert capture(made(), {"ids": IDS, "bias": None}).inputs == ("ids",)  # type: ignore[dict-item]


@pytest.mark.slow
def test_peft_with_adapters_in_it_and_merged() -> None:
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_key_value_heads=2, **sizes))
    options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        expected = model(**inputs).logits
        assert not torch.allclose(expected, base.eval()(**inputs).logits, atol=1e-3)
    for case in (model, model.merge_and_unload()):
        program = capture(case, inputs)
        assert [stack.blocks for stack in program.stacks.values()] == [2]
        torch.testing.assert_close(program.module(**inputs)["logits"], expected, rtol=0, atol=1e-5)


class Switching(Model):
    """As BigBird: a short input makes it go over to other parts, which it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.mode, self.last = "windows", nn.Sequential(nn.Linear(3, 3))

    def forward(self, ids: Tensor, bias: Tensor | None = None) -> dict[str, Any]:
        if ids.shape[1] < 4 and self.mode == "windows":
            self.mode, self.last = "full", nn.Sequential(nn.Tanh())
        return {"output": self.last(super().forward(ids, bias)["logits"])}


@pytest.mark.parametrize("rows", [1, 2])
def test_a_model_that_changes_itself_is_as_it_was(rows: int) -> None:
    """Nor does a call before the one that is traced change what is traced."""
    module = tiny.seeded(Switching)
    parts = list(module.modules())
    program = capture(module, {"ids": IDS[:rows]})
    assert (module.mode, list(module.modules())) == ("windows", parts)
    for _ in range(2):
        capture(module, {"ids": IDS[:rows, :3]})
        assert (module.mode, list(module.modules())) == ("windows", parts)
    with torch.no_grad():
        torch.testing.assert_close(program.module(ids=IDS)["output"], module(IDS)["output"])


def test_buffers_that_a_call_has_exchanged_are_back() -> None:
    """As those of rotations that follow the longest input seen, whose numbers go with the buffers."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.longest = 4
            self.register_buffer("scale", torch.ones(1))

        def forward(self, ids: Tensor) -> Tensor:
            self.longest, self.scale = ids.shape[1], torch.full((1,), 2.0)
            self.register_buffer("more", torch.ones(1))
            return ids * self.scale

    module = Scaled()
    with unchanged(module):
        module(IDS)
    assert (module.longest, module.scale.item(), [*module.state_dict()]) == (4, 1, ["scale"])


def _waves(tokens: int) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * torch.ones(8)
    return angles.cos(), angles.sin()


def _in_a_tuple(model: Any, tokens: int) -> Any:
    if model.table is None or len(model.table[0]) < tokens:
        model.table = _waves(tokens)
    return model.table


def _in_a_dictionary(model: Any, tokens: int) -> Any:
    if model.tables[0].get("longest", 0) < tokens:
        model.tables[0].update(longest=tokens, waves=_waves(tokens))
    return model.tables[0]["waves"]


def _as_a_new_attribute(model: Any, tokens: int) -> Any:
    if not hasattr(model, "longest") or model.longest < tokens:
        model.longest, model.new = tokens, {"waves": [_waves(tokens)]}
    return model.new["waves"][0]


def _in_an_object(model: Any, tokens: int) -> Any:
    if not hasattr(model, "holder"):
        model.holder = SimpleNamespace(waves=_waves(99))
    return model.holder.waves


def _by_a_hook(model: Any, tokens: int) -> Any:
    if not hasattr(model, "hooked"):
        model.hooked = model.last.register_forward_hook(lambda _, args, output: 2 * output)
    return _waves(tokens)


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("kept", [_in_a_tuple, _in_a_dictionary, _as_a_new_attribute, _in_an_object, _by_a_hook])
def test_what_a_call_keeps_for_the_next_one_is_not_kept(kept: Callable[[Any, int], Any], rows: int) -> None:
    """Neither for the trace, which would know the first length only, nor of it: its tensors have no contents."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.last, self.table = nn.Embedding(20, 8), nn.Tanh(), None
            self.tables: list[dict[str, Any]] = [{}]

        def forward(self, ids: Tensor) -> Tensor:
            first, second = (part[: ids.shape[1]] for part in kept(self, ids.shape[1]))
            return self.last(self.words(ids) * first + second)  # type: ignore[no-any-return]

    model = Keeping()
    before = {name: copy.copy(value) for name, value in vars(model).items()}
    ids = torch.arange(14).reshape(2, 7)
    program = capture(model, {"ids": ids[:rows, :3]})
    assert (vars(model), model.tables, [*model.last._forward_hooks]) == (before, [{}], [])
    for given in (ids, ids[:, :5]):
        tiny.assert_same(program.module(ids=given), {"output": model(given)})


class OfBatch(Model):
    """Takes a batch as one mapping, as a training loop has it, and gives it back with what it added."""

    def forward(self, batch: dict[str, Any], scale: float = 1.0) -> dict[str, Any]:  # type: ignore[override]
        batch["sum"] = scale * batch["bias"].sum((1, 2)) if batch["kind"] == "text" else None
        return {**batch, **super().forward(batch["ids"])}


@pytest.mark.parametrize("form", ["by names", "as the argument", "by the parameter's name"])
def test_a_forward_that_takes_one_mapping(form: str) -> None:
    torch.manual_seed(0)
    model, batch = OfBatch(), {"ids": IDS, "bias": torch.ones(2, 5, 8), "kind": "text", "none": None}
    example: Any = {"by names": batch, "as the argument": (batch,), "by the parameter's name": {"batch": batch}}[form]
    program = capture(model, example)
    assert (program.inputs, program.outputs) == (("ids", "bias"), ("sum", "logits"))
    assert list(batch) == ["ids", "bias", "kind", "none"]
    other = {"ids": IDS.flip(1)[:, :3], "bias": torch.randn(2, 3, 8)}
    model.config.use_cache = model.config.text_config.use_cache = False
    expected = model({**batch, **other})
    tiny.assert_same(program.module(**other), {name: expected[name] for name in program.outputs})
    report = check(model, example)
    assert report.ok, report.reason
    assert len(report.stacks) == 1


READS: dict[str, Callable[[Any], Any]] = {
    "a name": lambda batch: batch["ids"],
    "a name that may be missing": lambda batch: batch.get("ids"),
    "all": lambda batch: dict(**batch)["ids"],
}


@pytest.mark.parametrize("example", [{"ids": IDS + 15}, ({"ids": IDS + 15},), {"batch": {"ids": IDS + 15}}])
@pytest.mark.parametrize("reads", READS)
def test_a_forward_that_takes_one_mapping_may_fail_by_itself(reads: str, example: Any) -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(20, 8)

        def forward(self, batch: Any) -> Tensor:
            return self.words(READS[reads](batch))  # type: ignore[no-any-return]

    found = r"Reads does not run on the example inputs \(ids \[2, 5\]\): IndexError: .* at .*test_plain.py:\d+\n"
    with pytest.raises(ForwardError, match=found) as caught:
        capture(Reads(), example)
    assert isinstance(caught.value.__cause__, IndexError)


@pytest.mark.parametrize("example", [{"idx": IDS}, {"idx": IDS, "n": None}])
def test_a_mapping_for_a_forward_that_takes_none_has_unknown_names(example: Any) -> None:
    with pytest.raises(CaptureError, match=r"no parameter \['idx'.*\]; its parameters are \['ids', 'bias'\]"):
        capture(made(), example)
