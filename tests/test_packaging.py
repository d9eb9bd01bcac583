"""What is installed is what was written: once, under one name, and without torch on the runtime side."""

from __future__ import annotations

import ast
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import offramp

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("program", "passes", "training", "export", "bundle", "runtime", "calibration")

# Which other rooms a room may import.
MAY_IMPORT = {
    "bundle": set[str](),
    "runtime": {"bundle"},
    "calibration": {"bundle", "runtime"},
    "program": {"bundle"},
    "passes": {"program", "bundle"},
    "training": {"program", "passes"},
    "export": {"program", "passes", "bundle", "runtime"},
}

WITHOUT_TORCH = """
import sys

class Refuse:
    packages = {"torch", "onnx", "onnxscript", "networkx", "safetensors", "rich", "transformers"}

    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        if package in self.packages:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)

sys.meta_path.insert(0, Refuse())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code], capture_output=True, text=True, check=False, timeout=120
    )


def build(kind: str, target: Path) -> Path:
    """Build one distribution from the checkout, without network, and return its file."""
    command = [
        sys.executable,
        "-m",
        "build",
        f"--{kind}",
        "--no-isolation",
        "--outdir",
        str(target),
        str(ROOT),
    ]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (path,) = target.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel_files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    with zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("wheel"))) as wheel:
        return [name for name in wheel.namelist() if ".dist-info/" not in name]


def source_files() -> dict[str, Path]:
    """Every file that belongs into the package, by its place in a wheel."""
    found: dict[str, Path] = {}
    for room in ROOMS:
        found |= {f"offramp/{path.relative_to(ROOT).as_posix()}": path for path in (ROOT / room).rglob("*.py")}
    package = ROOT / "src" / "offramp"
    for path in package.rglob("*"):
        inside = path.relative_to(package)
        if inside.parts[0] not in ROOMS and path.suffix in {".py", ".typed", ".safetensors", ".json", ".txt"}:
            found[f"offramp/{inside.as_posix()}"] = path
    return found


def test_wheel_has_every_module_once_under_one_name(wheel_files: list[str]) -> None:
    assert len(wheel_files) == len(set(wheel_files))
    assert sorted(wheel_files) == sorted(source_files())
    assert {name.partition("/")[0] for name in wheel_files} == {"offramp"}


def test_sdist_has_the_rooms_and_no_second_copy(tmp_path: Path) -> None:
    with tarfile.open(build("sdist", tmp_path)) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in source_files().values()} <= names
    assert not any(name.startswith(f"src/offramp/{room}") for name in names for room in ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_links_are_relative_and_lead_to_the_rooms(room: str) -> None:
    link = ROOT / "src" / "offramp" / room
    assert link.is_symlink()
    assert link.readlink() == Path("..") / ".." / room
    assert link.resolve() == ROOT / room


def imports(path: Path) -> set[str]:
    """The full names of all modules that a file imports, in functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import, write offramp...."
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_in_one_direction(room: str) -> None:
    others = set(ROOMS) - {room} - MAY_IMPORT[room]
    for path in (ROOT / room).rglob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path) if name.startswith("offramp.")}
        assert not rooms & others, f"{path.relative_to(ROOT)} imports {sorted(rooms & others)}"


def test_runtime_and_package_import_without_torch() -> None:
    finished = run_without_torch(
        "import offramp, offramp.runtime, offramp.models, offramp.zoo\n"
        "for name in ('load', 'Chain', 'Result', 'Never', 'Depth', 'Confidence', 'Entropy', 'Patience'):\n"
        "    getattr(offramp, name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert finished.returncode == 0, finished.stderr


@pytest.mark.parametrize("room", ["bundle", "runtime", "calibration"])
def test_every_module_of_the_edge_imports_without_torch(room: str) -> None:
    """Each in an order of its own, so that none rests on what another has imported."""
    modules = [
        f"offramp.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}"
        for path in sorted((ROOT / room).rglob("[!_]*.py"))
    ]
    assert len(modules) > 5
    code = (
        "import importlib\n"
        f"for name in {modules}:\n"
        "    for loaded in [key for key in sys.modules if key.startswith('offramp.')]:\n"
        "        del sys.modules[loaded]\n"
        "    importlib.import_module(name)\n"
        "assert 'torch' not in sys.modules\n"
    )
    finished = run_without_torch(code)
    assert finished.returncode == 0, finished.stderr


def test_command_line_shows_its_help_without_torch() -> None:
    finished = run_without_torch("from offramp.cli import main\nsys.argv = ['offramp', '--help']\nmain()")
    assert finished.returncode == 0, finished.stderr
    assert "usage" in finished.stdout.lower()


def test_torch_side_without_torch_says_what_to_install() -> None:
    finished = run_without_torch("import offramp; offramp.capture")
    assert finished.returncode == 1
    assert "ImportError: offramp.capture needs torch" in finished.stderr
    assert "pip install 'offramp[torch]'" in finished.stderr


@pytest.mark.parametrize("name", offramp.__all__)
def test_public_names(name: str) -> None:
    assert getattr(offramp, name).__module__.startswith("offramp.")
    assert name in dir(offramp)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_reached_from_the_package(room: str) -> None:
    assert getattr(offramp, room).__name__ == f"offramp.{room}"


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="'offramp' has no attribute 'captur'"):
        _ = offramp.captur  # type: ignore[attr-defined]


def test_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("offramp") == offramp.__version__
