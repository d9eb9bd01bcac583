"""The command line: statuses, messages, and what each subcommand prints."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bundles
import clock
import numpy as np
import pytest
import tiny
import torch

import offramp
from offramp import cli
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.cli import _common, _inputs, _policy, _text, bench
from offramp.errors import OfframpError, PolicyError
from offramp.runtime import Confidence, Depth, Entropy, Never, Patience, Policy

ROOT = Path(__file__).resolve().parents[1]
MODELS = """
import tiny
from architectures import REFUSED

def encoder():
    return tiny.seeded(tiny.Encoder), tiny.text()

mlp = REFUSED["mlp"]
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bundles.classifier(tmp_path_factory.mktemp("cli") / "tiny.offramp")


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    np.save(tmp_path / "ids.npy", np.arange(8).reshape(2, 4))
    return tmp_path / "ids.npy"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    (tmp_path / "my_models.py").write_text(MODELS)
    return tmp_path / "my_models.py"


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What a command that ends with status 1 says on stderr; its first line starts with "offramp: "."""
    assert cli.main([str(item) for item in argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("offramp: ")
    assert "Traceback" not in captured.err
    return captured.err


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """What a command that ends well prints."""
    status = cli.main([str(item) for item in argv])
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    return captured.out


# The frame


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom offramp.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as left:\n    assert left.code == 0\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'numpy', 'rich', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    seconds = []
    for _ in range(3):
        started = clock.of_children()
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        seconds.append(clock.of_children() - started)
        assert finished.returncode == 0, finished.stderr
    assert all(name in finished.stdout for name in cli.COMMANDS)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_subcommand_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main([command, "--help"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: offramp {command} ")


def generate() -> Any:
    """docs/generate.py as a module."""
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse writes options in another way")
def test_help_pages_are_current() -> None:
    written = generate()
    assert written.PAGE.read_text(encoding="utf-8") == written.page(), "run python docs/generate.py"
    assert written.API.read_text(encoding="utf-8") == written.api(), "run python docs/generate.py"
    assert written.DESIGN.read_text(encoding="utf-8") == written.design(), "run python docs/generate.py"


def test_each_arrow_of_the_walk_is_an_import() -> None:
    written = generate()
    arrows = re.findall(r"^- `([^`]*)` -> `([^`]*)`: ", written.DESIGN.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(arrows) > 20
    assert set(arrows) <= written.imports()


def test_no_room_points_back() -> None:
    written = generate()
    outer = {(a.split("/")[0], b.split("/")[0]) for a, b in written.imports()}
    order = ("bundle", "program", "passes", "training", "runtime", "export", "calibration")
    assert all(order.index(a) >= order.index(b) for a, b in outer)


@pytest.mark.parametrize(
    "argv",
    [
        (),
        ("frob",),
        ("check",),
        ("export", "zoo:minilm"),
        ("export", "zoo:minilm", "-o", "x", "--segments", "0"),
        ("bench", "x", "--batch", "many"),
        ("bench", "x", "--against", "tensorrt=x"),
        ("bench", "x", "--against", "ort"),
        ("bench", "x", "--against", "ort=x", "--depths"),
    ],
)
def test_usage_is_status_2(argv: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.main(argv)
    assert left.value.code == 2
    assert "usage: offramp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OfframpError("no way", hint="another one"), "offramp: run: no way\n  try: another one\n"),
        (ImportError("offramp.save needs torch"), "offramp: offramp.save needs torch\n"),
        (ImportError("No rich", name="rich.table"), "offramp: No rich\n  try: pip install 'offramp[demo]'\n"),
        (
            OSError(28, "No room", "my.offramp"),
            "offramp: [Errno 28] No room: 'my.offramp'\n  try: a place that may be read and written, with room\n",
        ),
        (KeyError("x"), "offramp: internal error: KeyError: 'x'\n  try: the same with -v, which shows where\n"),
    ],
)
def test_errors_are_told_without_a_traceback_unless_asked_for(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr("offramp.cli.inspect.run", fail)
    assert refused(capsys, "inspect", "x") == said
    for argv in (["-v", "inspect", "x"], ["inspect", "x", "-v"]):
        assert cli.main(argv) == 1
        told = capsys.readouterr().err
        assert told.endswith(said)
        assert told.startswith("Traceback")


def test_python_m_offramp() -> None:
    shown = subprocess.run([sys.executable, "-m", "offramp", "--version"], capture_output=True, text=True, check=True)
    assert shown.stdout == f"offramp {offramp.__version__}\n"


@pytest.mark.parametrize("command", [("inspect",), ("check",), ("export", "-o", "x.offramp")])
def test_a_misspelt_pass_is_found_before_the_model_is_loaded(
    command: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("def factory():\n    raise SystemExit('loaded')")
    name, *options = command
    assert cli.main([name, "slow.py:factory", *options, "-p", "insert-exit{after=1}"]) == 1
    captured = capsys.readouterr()
    assert "rewrite: unknown pass 'insert-exit'; there are canonicalize, " in captured.err + captured.out


def test_a_missing_file_is_found_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "slow.py").write_text("def factory():\n    raise SystemExit('loaded')")
    said = refused(capsys, "export", "slow.py:factory", "-o", "x.offramp", "--file", "gone.json")
    assert "--file gone.json: there is no such file" in said
    for folder in ("de", "en"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "words.json").write_text("{}")
    same = ["--file", "en/words.json", "--file", "de/words.json"]
    said = refused(capsys, "export", "slow.py:factory", "-o", "x.offramp", *same)
    assert "--file en/words.json: another --file has that name" in said


NOISY = """
import sys
import transformers

def factory():
    print("bar" if transformers.utils.logging.is_progress_bar_enabled() else "no bar", file=sys.stderr)
    raise SystemExit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("verbose", [False, True])
def test_progress_bars_of_transformers_are_shown_only_with_v(tmp_path: Path, verbose: bool) -> None:
    (tmp_path / "noisy.py").write_text(NOISY)
    command = [sys.executable, "-m", "offramp", "inspect", "noisy.py:factory", *(["-v"] if verbose else [])]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert shown.stderr.splitlines()[-1] == ("bar" if verbose else "no bar")


WARNING = """
import logging
import torch

def factory():
    logging.getLogger("offramp.program.sizes").warning("for %d places alone", 4)
    logging.getLogger("offramp.program.sizes").info("a detail")
    other = logging.getLogger("another")
    other.addHandler(logging.StreamHandler())
    other.error("of its insides")
    logging.getLogger("one.more").error("of its insides")
    return torch.nn.Linear(2, 2), {"input": torch.ones(2, 2)}
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_warnings_of_the_package_are_shown_and_others_only_with_v(tmp_path: Path, verbose: bool) -> None:
    (tmp_path / "warning.py").write_text(WARNING)
    command = [sys.executable, "-m", "offramp", "inspect", "warning.py:factory", *(["-v"] if verbose else [])]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False).stderr
    assert ("offramp: for 4 places alone\n" in said) != verbose
    assert ("offramp.program.sizes: for 4 places alone\n" in said) == verbose
    assert ("of its insides" in said) == ("a detail" in said) == verbose


def test_logs_are_as_before_afterwards(tmp_path: Path) -> None:
    before = logging.getLogRecordFactory(), list(logging.getLogger("offramp").handlers)
    cli.main(["inspect", str(tmp_path / "gone.py:factory")])
    assert (logging.getLogRecordFactory(), list(logging.getLogger("offramp").handlers)) == before


def test_progress_bars_of_transformers_are_as_before_afterwards(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    assert transformers.utils.logging.is_progress_bar_enabled()
    cli.main(["inspect", str(tmp_path / "gone.py:factory")])
    assert transformers.utils.logging.is_progress_bar_enabled()


@pytest.mark.slow
def test_progress_bars_of_transformers_are_shown_afterwards_where_it_was_imported_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "quiet.py").write_text("import transformers.utils.logging\n")
    script = """
import sys
from offramp import cli
assert cli.main(["inspect", "quiet.py:factory"]) and "transformers" in sys.modules
import transformers
assert transformers.utils.logging.is_progress_bar_enabled()
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, capture_output=True)


def test_an_interrupt_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp.cli.inspect.run", stop)
    assert cli.main(["inspect", "x"]) == 130


def test_a_reader_that_has_had_enough_is_no_failure(tmp_path: Path) -> None:
    bundle = bundles.classifier(tmp_path / "m.offramp")
    command = [sys.executable, "-m", "offramp", "inspect", str(bundle)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141


# Policies as text


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("never", Never()),
        ("depth:2", Depth(2)),
        ("depth:encoder=2", Depth({"encoder": 2})),
        ("depth:encoder=2, decoder=1", Depth({"encoder": 2, "decoder": 1})),
        ("confidence:0.9", Confidence(0.9)),
        ("confidence:0.9,measure=margin", Confidence(0.9, "margin")),
        ("confidence:1=0.95,2=0.9", Confidence(thresholds={1: 0.95, 2: 0.9})),
        ("entropy:0.3", Entropy(0.3)),
        ("patience:2", Patience(2)),
    ],
)
def test_policy_text(text: str, policy: Policy) -> None:
    assert _policy.parse(text) == policy


@pytest.mark.parametrize(
    "text", ["", "confidently", "confidence", "confidence:", "confidence:high", "confidence:0.9,0.8",
             "confidence:0.9,measured=top1", "depth:2,encoder=1", "never:2", "patience:0", "depth:encoder=deep"],
)  # fmt: skip
def test_policy_text_that_makes_no_sense(text: str) -> None:
    with pytest.raises(PolicyError):
        _policy.parse(text)


# run


def test_run(bundle: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", bundle, "-i", f"ids={ids}", "--policy", "depth:2", "-o", tmp_path / "out")
    tables = [table.splitlines() for table in shown.split("\n\n")]
    assert tables[0][1].startswith("logits  float32  [2, 5]")
    assert [line.split() for line in tables[1][1:]] == [[str(row), "encoder", "2", "of", "4"] for row in (0, 1)]
    assert [line.split()[0] for line in tables[2]] == ["segment", "prologue", "block1", "block2", "exit2.tail", "all"]
    expected = offramp.load(bundle).run({"ids": np.load(ids)}, Depth(2)).outputs["logits"]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "logits.npy"), expected)


def test_run_shows_scores(bundle: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", bundle, "-i", f"ids={ids}", "--policy", "confidence:1.1")
    assert "4 of 4      top1 0." in shown


def test_run_needs_no_torch(bundle: Path, ids: Path) -> None:
    code = (
        "import sys\nfrom offramp.cli import main\n"
        f"assert main(['run', {str(bundle)!r}, '-i', 'ids={ids}']) == 0\nassert 'torch' not in sys.modules"
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "run: 'ids' is missing"),
        (("-i", "ids"), "run: cannot read the input 'ids'"),
        (("-i", "ids=gone.npy"), "run: input 'ids': gone.npy cannot be read"),
        (("-i", "ids=SEVERAL"), "several.npz has several arrays"),
        (("-i", "ids=IDS", "-o", "IDS"), "cannot be written"),
        (("-t", "a text"), "has no tokenizer.json"),
        (("--policy", "patience:x"), "'x' is no number"),
        (("--provider", "NoSuchProvider"), "no provider NoSuchProvider"),
        (("--policy", "depth:decoder=1", "-i", "ids=IDS"), "there is no stack 'decoder'"),
    ],
)
def test_run_refuses(
    argv: tuple[str, ...], said: str, bundle: Path, ids: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "several.npz", ids=np.load(ids), more=np.load(ids))
    given = [item.replace("IDS", str(ids)).replace("SEVERAL", str(tmp_path / "several.npz")) for item in argv]
    assert said in refused(capsys, "run", bundle, *given)


def test_run_of_what_is_no_bundle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "offramp: load: " in refused(capsys, "run", tmp_path)


def reading_bundle(root: Path) -> Path:
    """A classifier whose input is called input_ids, with a tokenizer of the words w5 to w9 in it."""
    tokenizers = pytest.importorskip("tokenizers")
    bundles.classifier(root)
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i for i in range(5, 10)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(root / "tokenizer.json"))
    manifest: dict[str, Any] = json.loads((root / MANIFEST_FILE).read_text())
    manifest["inputs"] = ["input_ids"]
    manifest["values"]["input_ids"] = manifest["values"].pop("ids")
    manifest["segments"]["prologue"]["inputs"] = {"ids": "input_ids"}
    manifest["files"]["tokenizer.json"] = vars(bundles.listed_file(root / "tokenizer.json"))
    (root / MANIFEST_FILE).write_text(json.dumps(manifest))
    return root


def test_text_becomes_ids(tmp_path: Path) -> None:
    root = reading_bundle(tmp_path / "reading.offramp")
    chain = offramp.load(root)
    (found,) = _text.encode(chain, root, ["w5 w6 w8", "w7 what w9"])
    assert list(found) == ["input_ids"]
    np.testing.assert_array_equal(found["input_ids"], np.array([[5, 6, 8], [7, 1, 9]]))
    assert found["input_ids"].dtype == np.int64


def pairing_bundle(root: Path, name: str = "input_ids") -> Path:
    """A classifier of pairs: its tokenizer puts w9 between the two texts, and the input is called ``name``."""
    tokenizers = pytest.importorskip("tokenizers")
    reading_bundle(root)
    tokenizer = tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A", pair="$A w9 $B:1", special_tokens=[("w9", 9)]
    )
    tokenizer.save(str(root / "tokenizer.json"))
    text = (root / MANIFEST_FILE).read_text().replace('"input_ids"', json.dumps(name))
    manifest: dict[str, Any] = json.loads(text)
    manifest["files"]["tokenizer.json"] = vars(bundles.listed_file(root / "tokenizer.json"))
    (root / MANIFEST_FILE).write_text(json.dumps(manifest))
    return root


def test_pairs_of_texts_are_one_row_each(tmp_path: Path) -> None:
    root = pairing_bundle(tmp_path / "pairs.offramp")
    (found,) = _inputs.given(offramp.load(root), root, (), ["w5 w6", "w7"], pairs=["w8", "w5 w6"])
    np.testing.assert_array_equal(found["input_ids"], np.array([[5, 6, 9, 8], [7, 9, 5, 6]]))


def test_run_on_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = pairing_bundle(tmp_path / "pairs.offramp")
    assert "w5 | w6" in run(capsys, "run", root, "-t", "w5", "--pair", "w6")
    said = refused(capsys, "run", root, "-t", "w5", "-t", "w6", "--pair", "w6")
    assert "2 of --text and 1 of --pair: a row needs one of each" in said
    assert "0 of --text and 1 of --pair" in refused(capsys, "run", root, "--pair", "w6")


def test_text_goes_to_the_one_input_of_token_ids_whatever_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pairing_bundle(tmp_path / "named.offramp", "idx")
    assert "w5 | w6" in run(capsys, "run", root, "-t", "w5", "--pair", "w6")


def test_no_text_for_an_input_that_only_looks_like_token_ids(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = pairing_bundle(tmp_path / "typed.offramp", "segment_ids")
    assert "not one input of token ids" in refused(capsys, "run", root, "-t", "w5")


def test_run_on_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", reading_bundle(tmp_path / "reading.offramp"), "-t", "w5 w6", "-t", "w7")
    assert "row  stack    left after  scores  text" in shown
    assert "1  encoder  4 of 4              w7" in shown


# bench


def test_bench(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "bench", bundle, "--batch", "3", "--tokens", "5", "--repeat", "2")
    inputs, ways, segments = shown.split("\n\n")
    assert inputs == "ids [3, 5]"
    assert [line.split("  ")[0] for line in ways.splitlines()[1:]] == ["full depth", "encoder 1 of 4", "encoder 2 of 4"]
    assert {"prologue", "block1", "block4", "exit1.tail"} <= {line.split()[0] for line in segments.splitlines()}


def test_bench_on_given_inputs(bundle: Path, ids: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "bench", bundle, "-i", f"ids={ids}", "--repeat", "1").startswith("ids [2, 4]\n")


def test_made_up_inputs_stay_within_the_axes(bundle: Path) -> None:
    chain = offramp.load(bundle)
    assert _inputs.made_up(chain, 100, 64)["ids"].shape == (100, bundles.LONGEST)
    chain.run(_inputs.made_up(chain, 2, 64))


def test_bench_alternates(bundle: Path) -> None:
    chain = offramp.load(bundle)
    ways: dict[str, Policy] = {"full": Never(), "early": Depth(1)}
    times, segments = bench.measure(chain, _inputs.made_up(chain, 1, 2), ways, 3)
    assert {way: len(found) for way, found in times.items()} == {"full": 3, "early": 3}
    assert len(segments["prologue"]) == 6
    assert len(segments["block4"]) == 3


@pytest.fixture(scope="module")
def beside(encoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle, and the same model as torch.onnx.export writes it."""
    root = tmp_path_factory.mktemp("beside")
    offramp.save(offramp.apply(encoder.program, "insert-exits{after=2}"), root / "m.offramp")
    free = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in tiny.text()}
    torch.onnx.export(
        tiny.seeded(tiny.Encoder),
        kwargs=tiny.text(),
        f=root / "m.onnx",
        dynamo=True,
        dynamic_shapes=free,
        verbose=False,
    )
    return root


def test_bench_against_one_session_and_torch(beside: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--repeat", "2", "--against", f"ort={beside / 'm.onnx'}", "--against", f"torch={models}:encoder"]
    _, ways, told, segments = run(capsys, "bench", beside / "m.offramp", *argv).split("\n\n")
    assert [line.split("  ")[0] for line in ways.splitlines()[1:]] == [
        "full depth",
        "encoder 2 of 4",
        f"ort {beside / 'm.onnx'}",
        f"torch {models}:encoder",
    ]
    for line in told.splitlines():
        found = re.search(r"outputs differ by up to (\S+) of their scale \(logits\)", line)
        assert found
        assert float(found[1]) < 1e-5
    assert "m.onnx" not in segments


def test_an_engine_that_computes_something_else_is_said_to(
    beside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "other.py").write_text(
        "import tiny\ndef encoder():\n    return tiny.seeded(tiny.Encoder, 1), tiny.text()\n"
        "def decoder():\n    return tiny.seeded(lambda: tiny.Encoder(pooled=False)), tiny.text()\n"
    )
    argv: list[str | Path] = ["bench", beside / "m.offramp", "--repeat", "1", "--against"]
    shown = run(capsys, *argv, f"torch={tmp_path / 'other.py'}:encoder")
    assert float(re.findall(r"differ by up to (\S+)", shown)[0]) > 0.01
    assert "outputs are of another shape" in run(capsys, *argv, f"torch={tmp_path / 'other.py'}:decoder")


@pytest.mark.parametrize(
    ("against", "said"),
    [
        (("ort=FOLDER/none.onnx",), "there is no such file"),
        (("ort=FOLDER/text.onnx",), "ONNX Runtime cannot load it"),
        (("ort=FOLDER/m.offramp/tail.onnx",), "and the bundle input_ids, attention_mask"),
        (("torch=zoo:none",), "the zoo has no model 'none'"),
        (("genai=FOLDER",), "--against: this bundle generates nothing"),
        (("genai=FOLDER", "torch=zoo:minilm"), "ort, torch run one pass, genai, ctranslate2 generate"),
    ],
)
def test_bench_against_refuses(
    against: tuple[str, ...], said: str, beside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (beside / "text.onnx").write_text("no model")
    argv = [item for other in against for item in ("--against", other.replace("FOLDER", str(beside)))]
    assert said in refused(capsys, "bench", beside / "m.offramp", *argv)


# inspect and export


def test_inspect_a_bundle(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "encoder: exits after 1, 2, 4 of 4 blocks" in run(capsys, "inspect", bundle)


def test_inspect_a_model(
    encoder: tiny.Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OFFRAMP_DUMP", "")  # put back as it was, whatever the command does
    monkeypatch.setattr(_common, "captured", lambda name: encoder.program)
    shown = run(capsys, "inspect", "any:model", "-p", "insert-exits{after=2}", "--dump", tmp_path / "dump")
    assert "4 blocks (encoder)" in shown
    assert "exit       after block 2" in shown
    assert list((tmp_path / "dump").iterdir())


def test_inspect_a_model_without_a_stack(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "inspect", f"{models}:mlp").startswith("offramp: structure: no stack")


@pytest.mark.parametrize("command", [("inspect",), ("export", "-o", "x"), ("check",)])
def test_model_names_that_lead_nowhere(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*command, "zoo:berta"]) == 1
    captured = capsys.readouterr()
    assert "model: the zoo has no model 'berta'" in captured.out + captured.err


def test_export(models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("further")
    argv: list[str | Path] = ["export", f"{models}:encoder", "-o", tmp_path / "out.offramp", "-p"]
    argv += ["insert-exits{after=2},insert-scores{measure=top1}", "--segments", "1", "--name", "small"]
    argv += ["--policy", "confidence:0.9", "--file", tmp_path / "notes.txt"]
    shown = run(capsys, *argv)
    assert "<offramp.Chain 'small'" in shown
    assert "errors against torch: segments " in shown
    chain = offramp.load(tmp_path / "out.offramp")
    assert chain.policy == Confidence(0.9)
    assert [part.depth for part in chain.stacks["encoder"].parts] == [2, 4]
    assert "notes.txt" in chain.manifest.files
    shown = run(capsys, "bench", tmp_path / "out.offramp", "--repeat", "1", "--tokens", "7")
    assert "encoder 2 of 4" in shown
