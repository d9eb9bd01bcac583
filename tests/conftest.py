"""Captured programs that the tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from functools import partial

import pytest
import shared
import tiny
import torch
from hypothesis import settings

pytest_plugins = ["skips", "pytester"]

gc.set_threshold(50_000, 20, 100)  # graphs are many small objects, and few of them garbage
torch.set_num_threads(1)  # for tensors this small a second thread costs more than it gives
_CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
if _CORES and (_worker := os.environ.get("PYTEST_XDIST_WORKER")):
    # A core for each worker: ONNX Runtime's threads would else wait for each other, each of them spinning.
    os.sched_setaffinity(0, {_CORES[int(_worker.removeprefix("gw")) % len(_CORES)]})

settings.register_profile("offramp", derandomize=True, database=None, deadline=None, max_examples=20)
settings.load_profile("offramp")


@pytest.fixture(scope="session", autouse=True)
def unchanged() -> Iterator[None]:
    """Programs that are shared are in the end what they were."""
    yield
    shared.check()


@pytest.fixture(scope="module", autouse=True)
def lasting() -> None:
    """What a module finds (imports, shared programs) stays: collecting garbage, as training does, passes it by."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def encoder() -> tiny.Captured:
    """Four blocks with the norm before, a padding mask, and a class of every row."""
    return tiny.captured(tiny.Encoder, tiny.text())


@pytest.fixture(scope="session")
def labeller() -> tiny.Captured:
    """Four blocks with the norm behind, a padding mask, and a class of every token."""
    return tiny.captured(
        partial(tiny.Encoder, "post", enter=True, leave=False, pooled=False),
        tiny.text(),
        seed=5,  # some exits are least sure of padding
    )


@pytest.fixture(scope="session")
def decoder() -> tiny.Captured:
    """A causal language model whose head is its table of words."""
    return tiny.captured(tiny.Decoder, {"input_ids": tiny.ids()})


@pytest.fixture(scope="session")
def two_stacks() -> tiny.Captured:
    """An encoder, and a decoder that attends to it."""
    return tiny.captured(tiny.TwoStacks, tiny.two_texts())


@pytest.fixture(scope="session")
def time_first() -> tiny.Captured:
    """Rows lie on axis 1: two blocks of a multi-head attention written out, no mask."""
    return tiny.captured(tiny.TimeFirst, {"x": tiny.signal()})


@pytest.fixture(scope="session")
def mixing() -> tiny.Captured:
    """No axis counts rows: the mean over the batch goes into every row."""
    return tiny.captured(tiny.Mixing, tiny.text())


#: Files of real models and of whole command lines. They come first, so that no worker is left with one at the end.
_LONG = ("test_real_generators.py", "test_demo.py", "test_readme.py", "test_directories.py", "test_zoo_generators.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _LONG)
