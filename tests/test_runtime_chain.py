"""Whatever the other rows of a batch do, a row gets what it gets alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import bundles
import numpy as np
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offramp
from offramp.bundle import directory
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.errors import BundleError, ExecutionError, PolicyError
from offramp.runtime.chain import Chain
from offramp.runtime.engine.binding import Call
from offramp.runtime.engine.loop import Loop
from offramp.runtime.policies.base import State

CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
EXITS = (1, 2, 4)


@pytest.fixture(scope="module")
def where(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="module", params=["host", "device"])
def chains(request: pytest.FixtureRequest, where: Path) -> dict[str, Chain]:
    """Bundles of every kind; on the "device" path, whose device is the CPU."""
    options: dict[str, dict[str, Any]] = {layout: {"layout": layout} for layout in bundles.LAYOUTS}
    options |= {"block": {"scores": "block"}, "adapters": {"adapters": True}, "shared": {"shared": True}}
    roots = {name: bundles.classifier(where / f"{request.param}-{name}", **o) for name, o in options.items()}
    roots["translator"] = bundles.translator(where / f"{request.param}-translator")
    return {name: _open(root, request.param) for name, root in roots.items()}


def _open(root: Path, path: str = "host") -> Chain:
    return Chain(*directory.read(root), _device=("cpu", 0) if path == "device" else None)


def _ids(layout: str, rows: int, tokens: int, seed: int = 0) -> np.ndarray[Any, Any]:
    shape = (rows, 3, tokens) if layout == "folded" else (rows, tokens)
    return np.random.default_rng(seed).integers(0, bundles.WORDS, shape)


class Schedule:
    """A policy as a function: row r leaves each stack after ``at[stack][r]`` blocks."""

    def __init__(self, at: Mapping[str, list[int]]) -> None:
        self.at = at
        self.seen: list[State] = []

    def __call__(self, state: State) -> Any:
        self.seen.append(state)
        return np.array([self.at[state.stack][row] <= state.after for row in state.rows])


def _exits(rows: int, among: tuple[int, ...] = EXITS) -> st.SearchStrategy[list[int]]:
    return st.lists(st.sampled_from(among), min_size=rows, max_size=rows)


few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@few
@given(data=st.data())
def test_each_row_gets_what_it_gets_alone(chains: dict[str, Chain], data: Any) -> None:
    name = data.draw(st.sampled_from([*bundles.LAYOUTS, "block", "adapters", "shared"]))
    rows = 1 if name == "none" else data.draw(st.integers(1, 6))
    ids = _ids(name, rows, data.draw(st.integers(1, bundles.LONGEST)), data.draw(st.integers(0, 99)))
    at = data.draw(_exits(rows))
    result = chains[name].run({"ids": ids}, Schedule({"encoder": at}))
    assert result.exits["encoder"].dtype == np.int64
    assert result.exits["encoder"].tolist() == at
    assert result.outputs["logits"].shape == (rows, 5)
    options = {key: name == key for key in ("adapters", "shared")}
    for row, after in enumerate(at):
        one = ids[row : row + 1]
        alone = chains[name].run({"ids": one}, offramp.Depth(after)).outputs["logits"]
        np.testing.assert_allclose(result.outputs["logits"][row], alone[0], **CLOSE)
        np.testing.assert_allclose(alone, bundles.expected(one, after, **options), rtol=1e-4, atol=1e-4)


@few
@given(data=st.data())
def test_two_stacks(chains: dict[str, Chain], data: Any) -> None:
    chain, rows, tokens = chains["translator"], data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    inputs = {"source": _ids("first", rows, tokens, 1), "target": _ids("first", rows, tokens, 2)}
    at = {"encoder": data.draw(_exits(rows, (1, 2))), "decoder": data.draw(_exits(rows, (1, 2)))}
    result = chain.run(inputs, Schedule(at))
    assert {name: found.tolist() for name, found in result.exits.items()} == at
    for row in range(rows):
        one = {name: array[row : row + 1] for name, array in inputs.items()}
        alone = chain.run(one, offramp.Depth({name: depths[row] for name, depths in at.items()}))
        assert list(alone.outputs) == list(result.outputs) == ["logits", "memory"]
        for name, array in alone.outputs.items():
            np.testing.assert_allclose(result.outputs[name][row], array[0], **CLOSE)


def test_scores_history_and_trace(chains: dict[str, Chain]) -> None:
    ids = _ids("first", 4, 3)
    alone = [chains["first"].run({"ids": ids}, offramp.Depth(after)).outputs["logits"] for after in EXITS[:2]]
    chances = [np.exp(logits) / np.exp(logits).sum(1, keepdims=True) for logits in alone]
    schedule = Schedule({"encoder": [4, 1, 2, 1]})
    result = chains["first"].run({"ids": ids}, schedule)
    one, two = schedule.seen
    assert (one.stack, one.after, one.blocks, one.rows.tolist(), one.history) == (
        "encoder",
        1,
        4,
        [0, 1, 2, 3],
        {},
    )
    assert (two.after, two.rows.tolist(), list(two.history)) == (2, [0, 2], [1])
    np.testing.assert_allclose(one.scores["top1"], chances[0].max(1), rtol=1e-4)
    np.testing.assert_allclose(one.scores["entropy"], -(chances[0] * np.log(chances[0])).sum(1), rtol=1e-3)
    assert one.scores["prediction"].tolist() == alone[0].argmax(1).tolist()
    assert one.scores["top1"].dtype == np.float32
    assert one.scores["prediction"].dtype == np.int64
    np.testing.assert_array_equal(two.history[1]["top1"], one.scores["top1"][[0, 2]])
    found = result.scores["encoder"]
    assert list(found) == [1, 2]
    np.testing.assert_array_equal(found[1]["top1"], one.scores["top1"])
    np.testing.assert_array_equal(found[2]["top1"], [two.scores["top1"][0], np.nan, two.scores["top1"][1], np.nan])
    assert found[2]["prediction"][[1, 3]].tolist() == [-1, -1]
    assert [(step.segment, step.rows) for step in result.trace] == [
        ("prologue", 4),
        ("block1", 4),
        ("exit1.tail", 4),
        ("block2", 2),
        ("exit2.tail", 2),
        ("block3", 1),
        ("block4", 1),
        ("exit4.tail", 1),
    ]
    assert all(step.milliseconds > 0 for step in result.trace)


def test_scores_of_a_block_cost_no_tail(chains: dict[str, Chain]) -> None:
    result = chains["block"].run({"ids": _ids("first", 4, 3)}, Schedule({"encoder": [4, 1, 4, 1]}))
    steps = [(step.segment, step.rows) for step in result.trace]
    assert ("exit1.tail", 2) in steps
    assert not any(name == "exit2.tail" for name, _ in steps)


def test_depth_and_never_run_no_other_tail(chains: dict[str, Chain]) -> None:
    for policy, blocks in ((offramp.Never(), 4), (offramp.Depth(2), 2)):
        steps = [step.segment for step in chains["adapters"].run({"ids": _ids("first", 2, 2)}, policy).trace]
        blocks_run = [f"block{i}" for i in range(1, blocks + 1)]
        adapter = ["exit2.adapter"] if blocks == 2 else []
        assert steps == ["prologue", *blocks_run, *adapter, f"exit{blocks}.tail"]


def test_full_depth_copies_nothing(where: Path) -> None:
    chain = _open(bundles.classifier(where / "copies"))
    made: list[Any] = []
    last = chain._loaded.engine._calls["exit4.tail"]
    run = last.run

    def spy(env: dict[str, Any]) -> None:
        run(env)
        made.append(env["logits4"])

    object.__setattr__(last, "run", spy)
    assert chain.run({"ids": _ids("first", 3, 2)}, lambda state: np.zeros(3, np.bool_)).outputs["logits"] is made[0]


def test_the_default_policy(where: Path) -> None:
    chain = _open(bundles.classifier(where / "none"))
    assert chain.policy == offramp.Never()
    policy = {"name": "confidence", "threshold": 0.0, "thresholds": {"1": 2.0}}
    chain = _open(bundles.classifier(where / "default", policy=policy))
    assert chain.policy == offramp.Confidence(0.0, thresholds={1: 2.0})
    assert chain.run({"ids": _ids("first", 2, 2)}).exits["encoder"].tolist() == [2, 2]
    assert chain.run({"ids": _ids("first", 2, 2)}, offramp.Never()).exits["encoder"].tolist() == [4, 4]


def test_a_model_of_one_row(chains: dict[str, Chain]) -> None:
    result = chains["none"].run({"ids": _ids("none", 1, 3)}, offramp.Confidence(0.0))
    assert result.exits["encoder"].tolist() == [1]
    assert result.scores["encoder"][1]["top1"].shape == (1,)


def test_what_a_chain_says_of_itself(chains: dict[str, Chain]) -> None:
    chain = chains["first"]
    assert list(chain.inputs) == ["ids"]
    assert str(chain.outputs["logits"]) == "float32 [batch, 5]"
    assert list(chain.stacks) == ["encoder"]
    text = repr(chain)
    for part in (
        "'tiny'",
        "fp32",
        "ids int64 [batch, tokens]",
        "exits after 1, 2, 4 of 4 blocks",
        "8 segments of 6",
    ):
        assert part in text


def test_threads_may_share_a_chain(chains: dict[str, Chain]) -> None:
    ids = [_ids("first", rows, 3, rows) for rows in range(1, 5)]
    at = [[EXITS[(row + rows) % 3] for row in range(rows)] for rows in range(1, 5)]
    wanted = [
        chains["first"].run({"ids": i}, Schedule({"encoder": a})).outputs["logits"]
        for i, a in zip(ids, at, strict=True)
    ]
    wrong: list[object] = []

    def work(n: int) -> None:
        for _ in range(40):
            try:
                found = chains["first"].run({"ids": ids[n]}, Schedule({"encoder": at[n]})).outputs["logits"]
                np.testing.assert_allclose(found, wanted[n], **CLOSE)
            except Exception as error:
                wrong.append(error)
                raise

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failure_says_which_value_is_missing() -> None:
    nothing: Any = None
    calls = {"part": Call("part", ("x", "y"), lambda env: env.update(z=env["y"]))}
    with pytest.raises(ExecutionError, match=r"segment 'part' failed with x \[2\], y missing: 'y'"):
        Loop(calls, nothing, [], nothing).segments(["part"], {"x": np.zeros(2)}, np.arange(2))


def test_a_failure_names_the_segment_and_leaves_the_chain_usable(
    chains: dict[str, Chain], capfd: pytest.CaptureFixture[str]
) -> None:
    ids = _ids("first", 2, 3)
    with pytest.raises(ExecutionError, match=r"segment 'prologue' failed with ids \[2, 3\]: .*indices element"):
        chains["first"].run({"ids": ids + 100})
    with pytest.raises(ZeroDivisionError):
        chains["first"].run({"ids": ids}, lambda state: 1 / 0)
    found = chains["first"].run({"ids": ids}, offramp.Depth(1)).outputs["logits"]
    np.testing.assert_allclose(found, bundles.expected(ids, 1), rtol=1e-4, atol=1e-4)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("function", "shown"),
    [
        (lambda state: np.ones(2), r"float64 \[2\]"),
        (lambda state: np.ones(3, np.bool_), r"bool \[3\]"),
        (lambda state: True, r"bool \[\]"),
        (lambda state: None, r"object \[\]"),
    ],
)
def test_a_function_that_returns_something_else(chains: dict[str, Chain], function: Any, shown: str) -> None:
    with pytest.raises(PolicyError, match=rf"has to return bool \[2\] after 1 blocks of 'encoder'.* {shown}"):
        chains["first"].run({"ids": _ids("first", 2, 3)}, function)
    with pytest.raises(PolicyError, match="is no policy"):
        chains["first"].run({"ids": _ids("first", 2, 3)}, 0.9)  # type: ignore[arg-type]


def test_a_function_may_return_a_list(chains: dict[str, Chain]) -> None:
    result = chains["first"].run({"ids": _ids("first", 2, 3)}, lambda state: [True, False][-state.rows.size :])
    assert result.exits["encoder"].tolist() == [1, 4]


def test_a_score_of_a_wrong_shape(where: Path) -> None:
    root = bundles.classifier(where / "scores")
    data = json.loads((root / MANIFEST_FILE).read_text())
    data["segments"]["exit1.tail"]["outputs"] = {"logits": "entropy1", "top1": "logits1"}
    data["stacks"]["encoder"]["exits"][0]["scores"] = {"entropy": "entropy1"}
    (root / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(ExecutionError, match=r"the score 'entropy' after 1 blocks .* \[2, 5\], expected \[2\]"):
        _open(root).run({"ids": _ids("first", 2, 3)}, offramp.Entropy(0.1))


def test_the_device_path_gathers_rows_with_the_bundles_own_files(where: Path) -> None:
    root = bundles.classifier(where / "takers", layout="second")
    chain = _open(root, "device")
    policy = Schedule({"encoder": [1, 4, 2]})
    wanted = chain.run({"ids": _ids("second", 3, 2)}, policy).outputs["logits"]
    data = json.loads((root / MANIFEST_FILE).read_text())
    data["take"] = {}
    (root / MANIFEST_FILE).write_text(json.dumps(data))
    found = _open(root, "device").run({"ids": _ids("second", 3, 2)}, policy).outputs["logits"]
    np.testing.assert_allclose(found, wanted, **CLOSE)
    data["take"] = {"float32/1": "tail.onnx"}
    (root / MANIFEST_FILE).write_text(json.dumps(data))
    with pytest.raises(BundleError, match=r"take 'float32/1' \(tail.onnx\) does not bind the input 'hidden'"):
        _open(root, "device")


@pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers(),
    reason="no CUDAExecutionProvider here",
)
def test_cuda(where: Path) -> None:
    root = bundles.classifier(where / "cuda")
    ids = _ids("first", 4, 3)
    policy = Schedule({"encoder": [1, 4, 2, 4]})
    wanted = _open(root).run({"ids": ids}, policy).outputs["logits"]
    found = offramp.load(root, providers=["CUDAExecutionProvider"]).run({"ids": ids}, policy).outputs["logits"]
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-3)
