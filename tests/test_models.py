"""Names of models: each form leads to a module with inputs, and each way to fail says what to try."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from offramp import errors, models, zoo
from offramp.program import capture

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft

FACTORIES = """
from dataclasses import dataclass

import torch
from torch import nn

import neighbour


@dataclass
class Config:
    width: int = 3


def by_name():
    width = Config().width
    return nn.Linear(width, 2), {"input": torch.ones(2, width)}


def by_position():
    from late_neighbour import SIZE
    return nn.Linear(SIZE, 2), [torch.ones(2, SIZE)]


def alone():
    return nn.Linear(3, 2)


def no_module():
    return "model", {"input": torch.ones(2, 3)}


def no_inputs():
    return nn.Linear(3, 2), {}


def bare_tensor():
    return nn.Linear(3, 2), torch.ones(2, 3)


def list_in_dict():
    return nn.Linear(3, 2), {"input": [1, 2, 3]}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("")
    (tmp_path / "late_neighbour.py").write_text("SIZE = 3")
    path = tmp_path / "my_models.py"
    path.write_text(FACTORIES)
    return path


def test_file_and_factory(file: Path) -> None:
    module, inputs = models.resolve(f"{file}:by_name")()
    assert isinstance(inputs, dict)
    assert module(**inputs).shape == (2, 2)


def test_inputs_by_position_become_a_tuple(file: Path) -> None:
    module, inputs = models.resolve(f"{file}:by_position")()
    assert isinstance(inputs, tuple)
    assert module(*inputs).shape == (2, 2)


STANDS_FOR_A_MODULE = """
from types import SimpleNamespace

import torch
from torch import nn


def exported():
    module = nn.Linear(3, 2)
    return torch.export.export(module, (torch.ones(2, 3),)), {"input": torch.ones(2, 3)}


def pipeline():
    return SimpleNamespace(model=nn.Linear(3, 2)), {"input": torch.ones(2, 3)}


def half():
    return nn.Linear(3, 2).bfloat16(), {"input": torch.ones(2, 3, dtype=torch.bfloat16)}
"""


@pytest.mark.parametrize("factory", ["exported", "pipeline", "half"])
def test_a_factory_may_return_what_stands_for_a_module(tmp_path: Path, factory: str) -> None:
    (tmp_path / "others.py").write_text(STANDS_FOR_A_MODULE)
    module, inputs = models.resolve(f"{tmp_path / 'others.py'}:{factory}")()
    assert isinstance(inputs, dict)
    assert capture(module, inputs).example_outputs["output"].dtype == torch.float32


def test_module_of_the_working_directory(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    module, _ = models.resolve("my_models:by_name")()
    assert isinstance(module, nn.Linear)


@pytest.mark.parametrize("name", ["", "model", "model.py", "hf:", "file.py:", ":factory", "file.py:not a name"])
def test_other_forms_are_refused(name: str) -> None:
    with pytest.raises(errors.ModelNameError, match=r"(?s)names no model.*file\.py:factory.*zoo:minilm"):
        models.resolve(name)


def test_a_directory_without_its_scheme(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(errors.ModelNameError, match=f"try: hf:{tmp_path}$"):
        models.resolve(str(tmp_path))


def test_unknown_zoo_model(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(zoo.UnknownModelError, match=r"(?s)no model 'berta'.*zoo:minilm") as caught:
        models.resolve("zoo:berta")
    assert isinstance(caught.value, ValueError)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(errors.FactoryMissingError, match=r"there is no file .*gone\.py"):
        models.resolve(f"{tmp_path / 'gone.py'}:factory")


def test_missing_module() -> None:
    with pytest.raises(errors.FactoryMissingError, match="there is no module no_such_package"):
        models.resolve("no_such_package.models:factory")()


def test_missing_import_inside_a_module_is_not_mistaken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needs_more.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        models.resolve("needs_more:factory")()


def test_missing_factory_lists_the_functions_of_the_file(file: Path) -> None:
    with pytest.raises(errors.FactoryMissingError, match=r"(?s)no function bynome.*one of .*by_name, by_position"):
        models.resolve(f"{file}:bynome")()


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        ("alone", "returned a Linear, expected a pair"),
        ("no_module", "returned a str as the module"),
        ("no_inputs", "returned a dict of 0 as example inputs"),
        ("bare_tensor", "returned a Tensor as example inputs"),
        ("list_in_dict", "returned a list of 3 as example input 'input'"),
    ],
)
def test_what_a_factory_returns_is_checked(file: Path, factory: str, reason: str) -> None:
    with pytest.raises(errors.FactoryResultError, match=reason):
        models.resolve(f"{file}:{factory}")()


def tiny(kind: str) -> transformers.PreTrainedModel:
    """A transformers model of two layers with random weights, one of each kind of input."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    match kind:
        case "encoder":
            return transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=50, **sizes))
        case "decoder":
            return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **sizes))
        case "encoder-decoder":
            config = transformers.T5Config(
                vocab_size=50,
                d_model=16,
                d_kv=8,
                d_ff=32,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
            )
            return transformers.T5ForConditionalGeneration(config)
        case "image":
            return transformers.ViTModel(transformers.ViTConfig(image_size=32, patch_size=16, **sizes))
        case "waveform":
            config = transformers.Wav2Vec2Config(
                **sizes,
                conv_dim=(16, 16),
                conv_stride=(10, 8),
                conv_kernel=(10, 8),
                num_conv_pos_embeddings=4,
                num_conv_pos_embedding_groups=2,
            )
            return transformers.Wav2Vec2Model(config)
        case "spectrogram":
            config = transformers.WhisperConfig(
                vocab_size=50,
                d_model=16,
                encoder_layers=2,
                decoder_layers=2,
                encoder_attention_heads=2,
                decoder_attention_heads=2,
                encoder_ffn_dim=32,
                decoder_ffn_dim=32,
                max_source_positions=20,
                max_target_positions=20,
                num_mel_bins=8,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
                decoder_start_token_id=1,
            )
            return transformers.WhisperForConditionalGeneration(config)
        case "patches":
            config = transformers.ASTConfig(max_length=32, num_mel_bins=16, **sizes)
            return transformers.ASTModel(config)
        case _:
            config = transformers.CLIPConfig(
                text_config={"vocab_size": 50, "projection_dim": 8, **sizes},
                vision_config={"image_size": 32, "patch_size": 16, "projection_dim": 8, **sizes},
                projection_dim=8,
            )
            return transformers.CLIPModel(config)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("encoder", {"input_ids": (2, 9), "attention_mask": (2, 9), "token_type_ids": (2, 9)}),
        ("decoder", {"input_ids": (2, 9), "attention_mask": (2, 9)}),
        ("encoder-decoder", {"input_ids": (2, 9), "attention_mask": (2, 9), "decoder_input_ids": (2, 7)}),
        ("image", {"pixel_values": (2, 3, 32, 32)}),
        ("waveform", {"input_values": (2, 4000)}),
        ("spectrogram", {"input_features": (2, 8, 40), "decoder_input_ids": (2, 7)}),
        ("patches", {"input_values": (2, 32, 16)}),
        ("text and image", {"input_ids": (2, 9), "pixel_values": (2, 3, 32, 32), "attention_mask": (2, 9)}),
    ],
)
def test_pretrained_directory(tmp_path: Path, kind: str, expected: dict[str, tuple[int, ...]]) -> None:
    saved = tiny(kind).eval()
    saved.save_pretrained(tmp_path)
    module, inputs = models.resolve(f"hf:{tmp_path}")()
    assert isinstance(inputs, dict)
    assert {name: tuple(tensor.shape) for name, tensor in inputs.items()} == expected
    assert type(module) is type(saved)
    assert not module.training
    assert not getattr(module.config, "use_cache", False)
    with torch.inference_mode():
        found, original = module(**inputs)[0], saved(**inputs)[0]
    torch.testing.assert_close(found, original, rtol=0, atol=0)


def test_weights_that_are_not_there_are_named(tmp_path: Path) -> None:
    saved = tiny("encoder")
    saved.save_pretrained(tmp_path)
    notes: list[str] = []
    models.resolve(f"hf:{tmp_path}", notes.append)()
    assert notes == []
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTokenClassification"]}))
    models.resolve(f"hf:{tmp_path}", notes.append)()
    assert len(notes) == 1
    assert "no weights for classifier.bias, classifier.weight of BertForTokenClassification" in notes[0]


def test_only_encoders_get_padding(tmp_path: Path) -> None:
    for kind, padded in (("encoder", True), ("decoder", False)):
        tiny(kind).save_pretrained(tmp_path / kind)
        _, inputs = models.resolve(f"hf:{tmp_path / kind}")()
        assert isinstance(inputs, dict)
        assert bool((inputs["attention_mask"] == 0).any()) is padded


def test_pretrained_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(errors.PretrainedModelError, match=r"(?s)could not be loaded.*config\.json and weights"):
        models.resolve(f"hf:{tmp_path}")()


@pytest.mark.parametrize(
    ("files", "name", "hint"),
    [
        ({"checkpoint-500/config.json": "{}"}, "", "try: a directory inside of it: hf:{folder}/checkpoint-500$"),
        ({"q4.gguf": "GGUF"}, "", r"try: AutoModelForCausalLM.from_pretrained\(FOLDER, gguf_file='q4.gguf'\)"),
        ({"q4.gguf": "GGUF"}, "/q4.gguf", r"gguf_file='q4.gguf'\).save_pretrained\(DIRECTORY\)"),
        (
            {"config.json": '{"model_type": "bert", "quantization_config": {"quant_method": "gptq", "bits": 4}}'},
            "",
            "try: its weights are quantized, and a bundle is made from float32 weights: the model before that",
        ),
    ],
)
def test_a_directory_that_does_not_load_says_what_would(
    tmp_path: Path, files: dict[str, str], name: str, hint: str
) -> None:
    for file, text in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(text)
    with pytest.raises(errors.PretrainedModelError, match=hint.format(folder=tmp_path)):
        models.resolve(f"hf:{tmp_path}{name}")()


def test_what_stands_behind_a_model_of_sentence_transformers_is_named(tmp_path: Path) -> None:
    tiny("encoder").save_pretrained(tmp_path)
    kinds = ("MLMTransformer", "SpladePooling")
    parts = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (tmp_path / "modules.json").write_text(json.dumps(parts))
    notes: list[str] = []
    models.resolve(f"hf:{tmp_path}", notes.append)()
    (note,) = notes
    assert f"hf:{tmp_path}: behind BertForMaskedLM modules.json has SpladePooling, left out of what follows" in note
    assert note.endswith("for all of it, a file.py:factory that returns (module, example_inputs)")


def test_pretrained_of_an_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture"}))
    with pytest.raises(errors.PretrainedModelError, match="could not be loaded"):
        models.resolve(f"hf:{tmp_path}")()


def test_pretrained_with_code_of_its_own(tmp_path: Path) -> None:
    mapped = {"AutoConfig": "configuration.Config", "AutoModel": "modeling.Model"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-architecture", "auto_map": mapped}))
    (tmp_path / "configuration.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(errors.PretrainedModelError, match=r"(?s)could not be loaded.*is not run.*file\.py:factory"):
        models.resolve(f"hf:{tmp_path}")()


# Adapters


def adapted(root: Path, **options: object) -> tuple[Path, transformers.PreTrainedModel]:
    """A directory with nothing but an adapter of the decoder beside it, and the two as peft runs them."""
    peft = pytest.importorskip("peft")
    tiny("decoder").save_pretrained(root / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(root / "base")
    settings = {"r": 2, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False}
    model = peft.get_peft_model(base, peft.LoraConfig(**{**settings, **options}))
    model.save_pretrained(root / "adapter")
    return root / "adapter", model.eval()


def test_an_adapter_is_merged_into_its_base(tmp_path: Path) -> None:
    folder, expected = adapted(tmp_path)
    module, inputs = models.resolve(f"hf:{folder}")()
    assert isinstance(inputs, dict)
    assert not any("lora" in name for name, _ in module.named_parameters())
    with torch.inference_mode():
        torch.testing.assert_close(module(**inputs).logits, expected(**inputs).logits, rtol=0, atol=1e-5)
    assert (
        models.settings(f"hf:{folder}", module, inputs)["generation"]
        == models.settings(f"hf:{tmp_path / 'base'}", module, inputs)["generation"]
    )


def test_an_adapter_with_words_of_its_own(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny("decoder").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.resize_token_embeddings(53, mean_resizing=False)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    expected = peft.get_peft_model(base, settings).eval()
    expected.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    module, _ = models.resolve(f"hf:{tmp_path / 'adapter'}")()
    ids = torch.tensor([[1, 52, 7], [50, 51, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(module(input_ids=ids).logits, expected(input_ids=ids).logits, rtol=0, atol=1e-5)


def test_an_adapter_with_more_classes_than_its_base(tmp_path: Path) -> None:
    """The number of classes stands nowhere but in the shape of the adapter's head."""
    peft = pytest.importorskip("peft")
    transformers.BertModel(tiny("encoder").config).save_pretrained(tmp_path / "base")
    base = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=4)
    settings = peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS", init_lora_weights=False)
    expected = peft.get_peft_model(base, settings).eval()
    expected.save_pretrained(tmp_path / "adapter")
    notes: list[str] = []
    module, inputs = models.resolve(f"hf:{tmp_path / 'adapter'}", notes.append)()
    assert isinstance(inputs, dict)
    with torch.inference_mode():
        found = module(**inputs).logits
        torch.testing.assert_close(found, expected(**inputs).logits, rtol=0, atol=1e-5)
    assert list(found.shape) == [2, 4]
    assert notes == []


def test_an_adapter_without_its_base_names_it(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path)
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(
        errors.PretrainedModelError, match=r"(?s)is an adapter \(LORA\) of '.*base', not a model.*merge_and_unload"
    ):
        models.resolve(f"hf:{folder}")()


def test_an_adapter_that_does_not_fit_its_base(tmp_path: Path) -> None:
    folder, _ = adapted(tmp_path)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    with pytest.raises(errors.PretrainedModelError, match=r"(?s)does not fit it: .*size mismatch.*made for"):
        models.resolve(f"hf:{folder}")()


def test_an_adapter_that_only_adds_tokens(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    tiny("decoder").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(errors.PretrainedModelError, match=r"(?s)cannot be merged.*file\.py:factory"):
        models.resolve(f"hf:{tmp_path / 'adapter'}")()
