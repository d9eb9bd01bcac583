"""The command line on bundles that generate: prompts and sound in, text out, and what leaving early is worth."""

from __future__ import annotations

import json
import re
import shutil
import sys
import wave
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import pytest
import tiny
import torch
from test_cli import run
from torch import Tensor, nn

import offramp
from offramp import cli
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.bundle.options import PROPAGATE
from offramp.calibration import reporting
from offramp.cli import _data, _depths, _generate, _inputs, _text, _words
from offramp.errors import InputError
from offramp.runtime import Depth, Token

tokenizers = pytest.importorskip("tokenizers")

PIPELINE = "insert-cache,insert-exits{stack=STACK,after=1|2},insert-scores{stack=STACK,measure=top1}"
TEXT = "é東ab !"  # ten bytes less one; with the mark at the end, the words of the tiny models
END = 10
AUDIO = {"rate": 16000, "n_fft": 400, "hop": 160, "mels": 8, "seconds": 1}
GENERATION = {"prompt": [], "stop": [], "template": "a{text}b"}


class Listener(nn.Module):
    """Reads tokens beside features of sound: two blocks that attend to them."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.decoder = nn.Linear(AUDIO["mels"], tiny.WIDTH), tiny.Encoder(causal=True, cross=True)
        self.decoder.blocks = self.decoder.blocks[:3]
        self.decoder.head = nn.Linear(tiny.WIDTH, tiny.WORDS)

    def forward(self, features: Tensor, input_ids: Tensor) -> Tensor:
        memory, x = self.enter(features.transpose(1, 2)), self.decoder.embed(input_ids)
        for block in self.decoder.blocks:
            x = block(x, None, memory)
        logits: Tensor = self.decoder.head(self.decoder.leave(x))
        return logits


def byte_tokenizer(root: Path) -> Path:
    """A token for each byte of `TEXT`, one for "c", and a special one."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = dict.fromkeys("".join(piece for piece, _ in level.pre_tokenize_str(TEXT)) + "c")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({sign: i for i, sign in enumerate(signs)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = level, tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.get_vocab_size() == tiny.WORDS
    tokenizer.save(str(root / "tokenizer.json"))
    return root / "tokenizer.json"


@pytest.fixture(scope="module")
def writer(decoder: tiny.Captured, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A causal model of bytes with exits after 1 and 2 of 4 blocks."""
    root = tmp_path_factory.mktemp("writer")
    program = offramp.apply(decoder.program, PIPELINE.replace("STACK", decoder.stack))
    offramp.save(program, root / "w.offramp", files=[byte_tokenizer(root)], generation=GENERATION)
    return root / "w.offramp"


@pytest.fixture(scope="module")
def listener(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `Listener`, exported with its settings for audio."""
    root = tmp_path_factory.mktemp("listener")
    inputs = {"features": torch.randn(2, 8, 100), "input_ids": tiny.ids()}
    captured = tiny.captured(
        Listener, inputs, dynamic={"features": {0: "batch"}, "input_ids": {0: "batch", 1: "tokens"}}
    )
    program = offramp.apply(captured.program, PIPELINE.replace("STACK", captured.stack))
    offramp.save(
        program,
        root / "l.offramp",
        files=[byte_tokenizer(root)],
        generation={"prompt": [7], "stop": [END]},
        preprocessing={"audio": AUDIO},
    )
    return root / "l.offramp"


def copied(bundle: Path, to: Path, **generation: Any) -> Path:
    """The bundle with other ``generation`` or ``audio``, and with ``files=False`` without a tokenizer."""
    shutil.copytree(bundle, to)
    manifest = json.loads((to / MANIFEST_FILE).read_text())
    if "audio" in generation:
        manifest["preprocessing"]["audio"] = generation.pop("audio")
    if not generation.pop("files", True):
        (to / "tokenizer.json").unlink()
        del manifest["files"]["tokenizer.json"]
    manifest["generation"] |= generation
    (to / MANIFEST_FILE).write_text(json.dumps(manifest))
    return to


def generate(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[str, str]:
    """What ``offramp run`` prints, and its last line on stderr."""
    status = cli.main(["run", *map(str, argv)])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out, captured.err


def refused(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    assert cli.main([str(item) for item in argv]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("offramp: run: ")
    return captured.err


def written(bundle: Path, prompt: list[int], count: int, policy: Any = None, **options: Any) -> tuple[str, list[int]]:
    """The text and the depths that `Chain.generate` gives."""
    chain = offramp.load(bundle)
    found = chain.generate({"input_ids": [prompt]}, policy, max_new_tokens=count, **options)
    tokenizer = _text.tokenizer_of(chain, bundle)
    return tokenizer.decode(found.tokens[0].tolist()), found.exits[0].tolist()


def ids(bundle: Path, text: str) -> list[int]:
    found: list[int] = _text.tokenizer_of(offramp.load(bundle), bundle).encode(text).ids
    return found


# Text in pieces


@pytest.fixture
def decode(tmp_path: Path) -> _words.Decode:
    return _words.decoder_of(tokenizers.Tokenizer.from_file(str(byte_tokenizer(tmp_path))))


def test_pieces_never_split_a_character(decode: _words.Decode) -> None:
    text = _words.Text(decode)
    depths = [4, 1, 1, 2, 1, 3, 2]  # é is two tokens, 東 three
    pieces = [text.add(token, depth) for token, depth in enumerate(depths)]
    assert [piece for piece, _ in pieces] == ["", "é", "", "", "東", "a", "b"]
    assert [depth for piece, depth in pieces if piece] == [4, 2, 3, 2], "the deepest of a character's tokens"


def test_special_tokens_are_left_out_and_what_is_no_character_comes_at_the_end(decode: _words.Decode) -> None:
    text = _words.Text(decode)
    assert text.add(END, 4) == ("", 4)
    assert text.add(5, 1) == ("a", 1)
    assert text.add(2, 1) == ("", 1)
    assert text.add(3, 1, last=True) == ("\N{REPLACEMENT CHARACTER}", 1)


def test_bytes_that_never_become_a_character_hold_nothing_back_for_good(decode: _words.Decode) -> None:
    text = _words.Text(decode)
    assert [text.add(token, 1)[0] for token in (2, 5, 6)] == ["", "\N{REPLACEMENT CHARACTER}a", "b"]


def test_without_a_tokenizer_tokens_are_numbers() -> None:
    text = _words.Text(_words.decoder_of(None))
    assert [text.add(token, 1)[0] for token in (7, 12)] == ["7 ", "12 "]


# run


@pytest.mark.parametrize(("flags", "prompt"), [((), "aéb"), (("--raw",), "é")])
def test_run_writes_on(flags: tuple[str, ...], prompt: str, writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = generate(capsys, writer, "-t", "é", "--max-new-tokens", "20", *flags)
    assert out == written(writer, ids(writer, prompt), 20)[0] + "\n"
    assert re.fullmatch(r"20 tokens, the first after [\d.]+ s, then [\d.]+ tokens/s; 4.0 of 4 blocks on average\n", err)


def test_tokens_that_come_at_once_have_taken_their_time(capsys: pytest.CaptureFixture[str]) -> None:
    """Five tokens of 2 ms each, of which nobody sees one before the others: 500 a second, not thousands."""
    tokens = [Token(0, 1, 2, {}, {}, 2.0, 0, at == 4, ()) for at in range(5)]
    printed = _words.print_tokens(lambda: tokens, 1, _words.decoder_of(None))
    assert printed.later == pytest.approx(4 * 2e-3)
    assert printed.exits == [[2] * 5]


def test_run_draws_with_a_seed(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("-t", "a", "--raw", "--max-new-tokens", "30", "--temperature", "3", "--top-k", "9", "--top-p", "0.95")
    first, again, other = (generate(capsys, writer, *argv, "--seed", seed)[0] for seed in "112")
    assert first == again != other
    options: dict[str, Any] = {"temperature": 3.0, "top_k": 9, "top_p": 0.95, "seed": 1}
    assert first == written(writer, ids(writer, "a"), 30, **options)[0] + "\n"


def test_run_stops_at_texts_and_keeps_from_repeating(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ("-t", "é", "--raw", "--max-new-tokens", "20")
    plain, _ = written(writer, ids(writer, "é"), 20)
    cut, text = 5, plain[3:5]
    assert text not in plain[: cut - 1]
    assert generate(capsys, writer, *argv, "--stop", text, "--stop", "zzz")[0] == plain[:cut] + "\n"
    options: dict[str, Any] = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2}
    flags = ("--repetition-penalty", "1.5", "--no-repeat-ngram-size", "2")
    wanted = written(writer, ids(writer, "é"), 20, **options)[0]
    assert generate(capsys, writer, *argv, *flags)[0] == wanted + "\n" != plain + "\n"


def test_run_searches_with_beams(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = [written(writer, ids(writer, text), 6, beams=3)[0] for text in ("a", "b")]
    argv = ("--raw", "--max-new-tokens", "6")
    out, err = generate(capsys, writer, "-t", "a", *argv, "--beams", "3", "--show-exits")
    assert re.sub(r"\|\d", "", out) == wanted[0] + "\n"
    assert "tokens/s" not in err
    own = copied(writer, tmp_path / "own.offramp", beams=3)
    out, _ = generate(capsys, own, "-t", "a", "-t", "b", *argv)
    assert out == f"row 0: {wanted[0]}\nrow 1: {wanted[1]}\n"
    out, _ = generate(capsys, own, "-t", "a", *argv, "--beams", "1")
    assert out == written(writer, ids(writer, "a"), 6)[0] + "\n"


def test_the_bundles_own_tokenizer_tells_where_a_text_stops(writer: Path, tmp_path: Path) -> None:
    chain = offramp.load(copied(writer, tmp_path / "own.offramp", stop_strings=["aaa"]))
    tokenizer = _text.tokenizer_of(chain, writer)
    found = chain.generate({"input_ids": [ids(writer, "é")]}, max_new_tokens=30).tokens[0].tolist()
    text = tokenizer.decode(found)
    assert text.find("aaa") == len(text) - 3
    again = chain.generate({"input_ids": [ids(writer, "é")]}, max_new_tokens=30, tokenizer=tokenizer).tokens[0]
    assert again.tolist() == found
    bare = offramp.load(copied(writer, tmp_path / "bare.offramp", stop_strings=["aaa"], files=False))
    with pytest.raises(offramp.OfframpError, match="they need a tokenizer"):
        bare.generate({"input_ids": [[5]]})
    (tmp_path / "own.offramp" / "tokenizer.json").unlink()
    assert chain.generate({"input_ids": [ids(writer, "é")]}, max_new_tokens=30).tokens[0].tolist() == found


@pytest.mark.parametrize(("act", "problem"), [("unlink", "is missing"), ("write", "was altered")])
def test_a_tokenizer_that_is_another_by_now_is_refused(act: str, problem: str, writer: Path, tmp_path: Path) -> None:
    chain = offramp.load(copied(writer, tmp_path / "own.offramp", stop_strings=["aaa"]))
    file = tmp_path / "own.offramp" / "tokenizer.json"
    file.unlink() if act == "unlink" else file.write_text("{}")
    with pytest.raises(offramp.errors.BundleError, match=f"tokenizer.json {problem}"):
        chain.generate({"input_ids": [[5]]})


@pytest.mark.parametrize("propagate", PROPAGATE)
def test_run_shows_depths_plainly_where_stdout_is_no_terminal(
    propagate: str, writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ("-t", "a b", "--raw", "--max-new-tokens", "16", "--policy", "depth:2", "--show-exits")
    out, err = generate(capsys, writer, *argv, "--propagate", propagate)
    text, depths = written(writer, ids(writer, "a b"), 16, Depth(2), propagate=propagate)
    assert depths == [4] + [2] * 15
    assert re.sub(r"\|\d", "", out) == text + "\n"
    assert set(re.findall(r"\|(\d)", out)) <= {"2", "4"}
    assert "\033" not in out
    assert "2.1 of 4 blocks on average" in err


def test_run_colours_depths_on_a_terminal(
    writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    out, _ = generate(capsys, writer, "-t", "a b", "--max-new-tokens", "16", "--policy", "depth:1", "--show-exits")
    legend, text = out.split("\n", 1)
    assert legend == "after \033[38;5;34m1\033[0m \033[38;5;142m2\033[0m \033[38;5;160m4\033[0m of 4 blocks"
    assert text.rstrip("\n").endswith("\033[0m")
    assert {int(colour) for colour in re.findall(r"5;(\d+)m", text)} <= {34, 160}
    assert re.sub(r"\033\[[\d;]*m", "", text) == written(writer, ids(writer, "aa bb"), 16, Depth(1))[0] + "\n"


def test_run_writes_several_rows_each_as_one_line(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, err = generate(capsys, writer, "-t", "a", "-t", "b !a", "--raw", "--max-new-tokens", "8")
    lines = [f"row {row}: {written(writer, ids(writer, text), 8)[0]}" for row, text in enumerate(["a", "b !a"])]
    assert sorted(out.splitlines()) == sorted("\n".join(lines).splitlines())
    assert err.startswith("16 tokens")


def test_run_takes_token_ids_and_writes_them_without_a_tokenizer(
    writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "ids.npy", np.array([[5, 6]]))
    bare = copied(writer, tmp_path / "bare.offramp", files=False)
    out, _ = generate(capsys, bare, "-i", f"input_ids={tmp_path / 'ids.npy'}", "--max-new-tokens", "5")
    found = offramp.load(bare).generate({"input_ids": [[5, 6]]}, max_new_tokens=5)
    assert out.split() == [str(token) for token in found.tokens[0]]


def test_run_once_is_one_pass(writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "run", writer, "--once", "-t", "ab", "--policy", "depth:2", "-o", tmp_path)
    assert "output  float32  [1, 2, 11]" in shown
    assert "decoder  2 of 4" in shown
    expected = offramp.load(writer).run({"input_ids": [ids(writer, "ab")]}, Depth(2)).outputs["output"]
    np.testing.assert_array_equal(np.load(tmp_path / "output.npy"), expected)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "'input_ids' is missing"),
        (("-t", ""), "every row needs at least one token"),
        (("-t", "a", "-o", "x"), "--output writes the outputs of one pass, not text\n  try: --once"),
        (("-t", "a", "--once", "--raw", "--top-k", "3"), "--top-k, --raw: with --once nothing is generated"),
        (("-t", "a", "--temperature", "-1"), "temperature is -1.0, expected 0 (greedy) or a positive number"),
        (("-t", "a", "--max-new-tokens", "100"), "try: max_new_tokens=64"),
        (("-i", "input_ids=NUMBER"), "'input_ids' has to be rows of token ids"),
        (("--audio", "x.wav"), "does not turn sound into inputs"),
        (("-t", "a", "--policy", "depth:3"), "has no exit after 3 blocks"),
    ],
)
def test_run_refuses_to_generate(
    argv: tuple[str, ...], said: str, writer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = copied(writer, tmp_path / "raw.offramp", template="{text}")
    np.save(tmp_path / "number.npy", np.int64(1))
    given = [item.replace("NUMBER", str(tmp_path / "number.npy")) for item in argv]
    assert said in refused(capsys, "run", raw, *given)


def test_run_of_a_bundle_without_caches_refuses_what_is_about_generation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "run", bundles.classifier(tmp_path / "c.offramp"), "--seed", "1", "--show-exits")
    assert "--seed, --show-exits: this bundle has no caches, so it does not generate" in said
    assert "insert-cache" in said


def test_text_needs_a_tokenizer_and_the_package(
    writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = copied(writer, tmp_path / "bare.offramp", files=False)
    assert "has no tokenizer.json\n  try: offramp export" in refused(capsys, "run", bare, "-t", "a")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "text needs the package tokenizers\n  try: pip install" in refused(capsys, "run", writer, "-t", "a")


def test_a_template_is_text_not_a_format(writer: Path, tmp_path: Path) -> None:
    odd = copied(writer, tmp_path / "odd.offramp", template="{text.__class__}{text}{0}")
    assert _generate.prompt(offramp.load(odd), odd, "a") == ids(odd, "{text.__class__}a{0}")


# Sound


def sound(path: Path, seconds: float, rate: int = 8000) -> Path:
    samples = np.sin(np.arange(int(seconds * rate)) / 5) * 9000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate)
        file.writeframes(samples.astype("<i2").tobytes())
    return path


def test_run_listens(listener: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from offramp.runtime.preprocess.audio import log_mel, read_wav, resample

    path = sound(tmp_path / "a.wav", 0.5)
    out, err = generate(capsys, listener, "--audio", path, "--max-new-tokens", "12")
    chain = offramp.load(listener)
    features = log_mel(resample(*read_wav(path), 16000), **AUDIO)
    found = chain.generate({"features": features}, max_new_tokens=12)
    assert out == _text.tokenizer_of(chain, listener).decode(found.tokens[0].tolist()) + "\n"
    assert " of 3 blocks on average" in err


def test_prompts_of_a_file_are_not_cut(listener: Path, tmp_path: Path) -> None:
    (tmp_path / "data.txt").write_text("ab a\n")
    with pytest.raises(InputError, match="--truncate: a prompt is not cut"):
        _data.read(offramp.load(listener), listener, tmp_path / "data.txt", truncate=True)


def test_examples_may_be_sounds(listener: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the text that is said; the paths go from where the file lies."""
    path = sound(tmp_path / "a.wav", 0.5)
    (tmp_path / "data.jsonl").write_text('{"audio": "a.wav", "label": "ab a"}\n{"audio": "gone.wav"}\n')
    chain = offramp.load(listener)
    with pytest.raises(InputError, match=r"gone.wav cannot be read"):
        _data.read(chain, listener, tmp_path / "data.jsonl")
    (tmp_path / "data.jsonl").write_text('{"audio": "a.wav", "label": "ab a"}\n')
    (found,) = _data.read(chain, listener, tmp_path / "data.jsonl")
    np.testing.assert_array_equal(found["features"], _inputs.hear(chain, listener, [path])[0]["features"])
    ids = _text.tokenizer_of(chain, listener).encode("ab a", add_special_tokens=False).ids
    assert found["labels"][0].tolist()[: len(ids)] == ids


def test_run_once_listens_too(listener: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sound(tmp_path / "a.wav", 0.5)
    assert "[1, 1, 11]" in run(capsys, "run", listener, "--once", "--audio", path, "-t", "a")


def test_run_refuses_sound(listener: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    long = sound(tmp_path / "long.wav", 1.5)
    assert "the sound lasts 1.5 s, the model takes 1 s" in refused(capsys, "run", listener, "--audio", long)
    assert "gone.wav cannot be read" in refused(capsys, "run", listener, "--audio", tmp_path / "gone.wav")
    assert "'features' is missing" in refused(capsys, "run", listener)
    deaf = copied(listener, tmp_path / "deaf.offramp", audio=None)
    assert "it has no settings for sound" in refused(capsys, "run", deaf, "--audio", long)


# bench --depths


def test_bench_depths(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = run(capsys, "bench", writer, "--depths", "--repeat", "16", "--tokens", "9")
    given, table, last = shown.rstrip("\n").split("\n\n")
    assert given == "input_ids [1, 9] and 16 tokens"
    heads, *rows = (re.split(r"  +", line) for line in table.splitlines())
    assert heads == ["blocks", "ms a token", "all early", "1 of 2 early", "3 of 4 early", "7 of 8 early"]
    assert [row[0] for row in rows] == ["1 of 4", "2 of 4", "4 of 4"]
    assert all(re.fullmatch(r"[+-]\d+\.\d%", cell) for row in rows[:-1] for cell in row[2:])
    assert last.startswith("break-even: ")


def test_bench_of_a_model_with_places_for_few_tokens(writer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "bench", writer, "--depths").startswith("input_ids [1, 29] and 32 tokens\n")
    assert "decoder 2 of 4" in run(capsys, "bench", writer, "--repeat", "1")


def test_bench_depths_on_given_inputs(listener: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = sound(tmp_path / "a.wav", 0.5)
    shown = run(capsys, "bench", listener, "--depths", "--repeat", "8", "--audio", path, "-t", "ab a")
    assert "features [1, 8, 100]" in shown
    assert "input_ids [1, 4]" in shown


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--batch", "2"), "--depths times one row"),
        (("-t", "a", "-t", "b"), "--depths times one row, these are 2"),
        (("--repeat", "4"), "--repeat 4 is too few tokens: every 8th goes to full depth"),
        (("--repeat", "80"), "the model takes 64 tokens"),
    ],
)
def test_bench_depths_refuses(
    argv: tuple[str, ...], said: str, writer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "bench", writer, "--depths", *argv)


def test_bench_depths_needs_caches_and_exits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "bench", bundles.classifier(tmp_path / "c.offramp"), "--depths")
    assert "--depths: this bundle has no caches" in said


# bench --against what generates


ENGINES = {
    "onnxruntime_genai": """
class Config:
    def __init__(self, path): pass
    def overlay(self, text): self.text = text
class Model:
    def __init__(self, config):
        assert '"eos_token_id": 10' in config.text
        assert '"intra_op_num_threads": 1' in config.text
class GeneratorParams:
    def __init__(self, model): pass
    def set_search_options(self, do_sample, max_length): self.length = max_length
class Generator:
    def __init__(self, model, params): self.tokens, self.length = [], params.length
    def append_tokens(self, rows): self.tokens += rows[0]
    def is_done(self): return len(self.tokens) == self.length
    def generate_next_token(self): self.tokens.append(3)
    def get_sequence(self, row): return self.tokens
""",
    "ctranslate2": """
class StorageView:
    from_array = staticmethod(lambda array: array)
class Found:
    sequences_ids = [[1, 2, 3]]
class models:
    class Whisper:
        def __init__(self, path, device, intra_threads): pass
        def generate(self, features, prompts, beam_size):
            assert features.shape == (1, 8, 100) and prompts == [[7]] and beam_size == 1
            return [Found]
""",
}


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of modules that stand for engines, where a process of its own finds them; and a model's directory."""
    for name, code in ENGINES.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "genai_config.json").write_text('{"model": {"vocab_size": 11}}')
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path / "model"


def test_a_report_of_made_up_prompts_leaves_room(
    writer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[int, int, int]] = []

    def report(chain: offramp.Chain, data: Any, **options: Any) -> Any:
        assert chain.manifest.cache is not None
        asked.append((chain.manifest.cache.limit or 0, data[0]["input_ids"].shape[1], options["max_new_tokens"]))
        return reporting_report(chain, data[:1], **options)

    reporting_report = reporting.report
    monkeypatch.setattr(reporting, "report", report)
    assert run(capsys, "report", writer).startswith("cannot say without examples")
    run(capsys, "report", writer, "--max-new-tokens", "60")
    assert asked == [(64, 33, 32), (64, 5, 60)]
    assert "try: max_new_tokens=64, or --max-new-tokens 64" in refused(
        capsys, "report", writer, "--max-new-tokens", "99"
    )


def test_bench_against_genai(writer: Path, engines: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--against", f"genai={engines}", "--repeat", "6", "--tokens", "9", "--threads", "1"]
    given, table = run(capsys, "bench", writer, *argv).rstrip("\n").split("\n\n")
    assert given == "input_ids [1, 9] and 6 tokens"
    heads, full, genai = (re.split(r"  +", line.strip()) for line in table.splitlines())
    assert heads == ["way", "first ms", "all ms", "tokens", "tokens/s", "speed-up", "same tokens"]
    assert (full[0], full[3], full[5], full[6]) == ("full depth", "6", "1.000", "6")
    assert (genai[0], genai[3]) == (f"genai {engines}", "6")


def test_bench_against_ctranslate2(
    listener: Path, engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv: list[str | Path] = ["--against", f"ctranslate2={engines}", "--audio", sound(tmp_path / "a.wav", 0.5)]
    given, table = run(capsys, "bench", listener, *argv).rstrip("\n").split("\n\n")
    assert given == "features [1, 8, 100], input_ids [1, 1] and all that follows"
    assert table.splitlines()[-1].startswith(f"ctranslate2 {engines}")


def test_bench_against_an_engine_that_is_not_there_or_does_not_fit(
    writer: Path, listener: Path, engines: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for other in ("genai", "ctranslate2"):
        said = refused(capsys, "bench", writer, "--against", f"{other}={tmp_path / 'none'}")
        assert "there is no such directory" in said
    assert "takes features" in refused(capsys, "bench", writer, "--against", f"ctranslate2={engines}")
    assert "takes token ids alone" in refused(capsys, "bench", listener, "--against", f"genai={engines}")
    assert "--against times one row" in refused(
        capsys, "bench", writer, "--batch", "2", "--against", f"genai={engines}"
    )
    (tmp_path / "ctranslate2.py").write_text("raise ModuleNotFoundError(\"No module named 'ctranslate2'\")")
    said = refused(capsys, "bench", writer, "--against", f"ctranslate2={engines}")
    assert "No module named 'ctranslate2'\n  try: pip install ctranslate2" in said


def test_every_nth_token_takes_along_what_waits(writer: Path) -> None:
    chain = offramp.load(writer)
    policy = _depths.EveryNth(_words.token_stack(chain).name, 1, 4)
    steps = list(chain.stream({"input_ids": [[5, 6]]}, policy, max_new_tokens=13))
    assert [step.exit for step in steps] == [4, *[1, 1, 1, 4] * 3]
    assert [step.caught_up > 0 for step in steps] == [step == 3 for step in [0, *[0, 1, 2, 3] * 3]]


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({(1, 2): -3.0, (1, 4): 2.0, (2, 4): 4.4, (2, 8): 30.0}, "with 3 of 4 tokens leaving after 2 of 4 blocks, 4%"),
        ({(1, 0): 50.0, (1, 8): 0.4}, "none; even 7 of 8 tokens leaving early save less than 1%"),
    ],
)
def test_break_even(saved: dict[tuple[int, int], float], said: str, writer: Path) -> None:
    assert said in _depths._break_even(_words.token_stack(offramp.load(writer)), saved)


# export


def test_what_a_model_of_the_zoo_brings_along() -> None:
    from offramp import models, zoo

    found = models.settings("zoo:whisper_tiny_en")
    assert found["preprocessing"] == {"audio": zoo.audio("whisper_tiny_en")}
    assert found["generation"] == zoo.generation("whisper_tiny_en")
    assert list(found["files"]) == ["tokenizer.json"]
    minilm = models.settings("zoo:minilm")
    assert (minilm["generation"], minilm["preprocessing"]) == ({}, {})
    assert not any(models.settings("models.py:whisper_tiny_en").values())


def test_export_for_a_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "my.py").write_text(
        "import tiny\ndef decoder():\n    return tiny.seeded(tiny.Decoder), {'input_ids': tiny.ids()}\n"
    )
    out = tmp_path / "out.offramp"
    argv = ["export", f"{tmp_path / 'my.py'}:decoder", "-o", str(out), "-p", "insert-cache", "--target", "portable"]
    assert "<offramp.Chain 'out'" in run(capsys, *argv)
    cache = offramp.load(out).manifest.cache
    assert cache is not None
    assert not cache.rowwise
    assert "has no exit before full depth" in refused(capsys, "bench", out, "--depths")
    with pytest.raises(SystemExit):
        cli.main([*argv[:-1], "cuda"])
