"""A bundle's card: what is in it and how to run it, for people, in a ``README.md`` beside the manifest.

The card says nothing that the manifest does not, so the manifest does not list it: whoever writes the one writes the
other. A ``README.md`` that the manifest lists is the user's own, and stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from offramp.bundle.directory import write_whole
from offramp.bundle.expressions import evaluate, names
from offramp.bundle.manifest import Manifest, Value
from offramp.bundle.precision import ANSWERS, ERROR, EXITS, against_fp32
from offramp.runtime.engine.widths import kinds

CARD_FILE = "README.md"
_TOKENIZER = "tokenizer.json"
_TOKENS = 8  # of the example inputs
_SHOWN = 12  # items of a list, and a line of a pass
_FIGURES = {
    "segments": "each segment",
    "chain": "all of it, at full depth",
    "exits": "every exit",
    "other_shapes": "other batches and lengths",
    "rows": "rows that leave one by one",
    "cache": "token by token",
}


def write(manifest: Manifest, root: Path, name: str | None = None) -> None:
    """Write the card of the bundle in directory ``root``, in one step, unless the user's own lies there.

    ``name`` is what the directory will be called, its present name if None.
    """
    if CARD_FILE in manifest.files:
        return
    write_whole(root / CARD_FILE, card(manifest, name or root.name), 0o644)


def card(manifest: Manifest, name: str) -> str:
    """The card as Markdown; ``name`` is the bundle's directory, as its examples have it."""
    parts = [
        f"# {manifest.model}\n\nA transformer as a chain of ONNX segments, which offramp runs.",
        _origin(manifest),
        f"## Inputs and outputs\n\n{_values(manifest)}",
        f"## Stacks and exits\n\n{_stacks(manifest)}",
        f"## When it leaves\n\n{_policy(manifest)}",
    ]
    for title, found in (("Generation", manifest.generation), ("Preprocessing", manifest.preprocessing)):
        if lines := list(_settings(found)):
            parts.append(f"## {title}\n\n" + "\n".join(lines))
    parts += [f"## Compared with torch\n\n{_validation(manifest)}", f"## How to run it\n\n{_usage(manifest, name)}"]
    return "\n\n".join(part for part in parts if part) + "\n"


def _origin(manifest: Manifest) -> str:
    about = manifest.provenance
    rows = {
        "made from": about.get("source"),
        "licence": about.get("licence", "not known: that of the model's authors holds"),
        "passes": ", ".join(_brief(str(one)) for one in about.get("pipeline", ())) or "none",
        "precision": manifest.precision,
        "opset": about.get("opset"),
        "versions": ", ".join(f"{package} {version}" for package, version in about.get("versions", {}).items()),
        "size": f"{sum(file.bytes for file in manifest.files.values()) / 1e6:,.1f} MB in {len(manifest.files)} files",
    }
    return _table(("", ""), [(key, str(value)) for key, value in rows.items() if value])


def _values(manifest: Manifest) -> str:
    rows = [("input", name, _value(manifest.values[name])) for name in manifest.inputs]
    rows += [("output", name, _value(manifest.values[value])) for name, value in manifest.outputs.items()]
    rows += [("classes", name, _listed(labels)) for name, labels in manifest.labels.items()]
    shown = [manifest.values[name] for name in (*manifest.inputs, *manifest.outputs.values())]
    named = set().union(*(names(size) for value in shown for size in value.shape))
    axes = {axis: limits for axis, limits in manifest.axes.items() if axis in named}
    limits = [f"{axis} from {low}" + (f" to {high}" if high else "") for axis, (low, high) in axes.items()]
    return _table(("", "name", "type and shape"), rows) + (f"\n\nSizes: {', '.join(limits)}." if limits else "")


def _value(value: Value) -> str:
    return str(value).replace("*", r"\*")


def _stacks(manifest: Manifest) -> str:
    rows = []
    for name, stack in manifest.leaving.items():
        exits = [item for item in stack.exits if item.after < stack.blocks]
        scores = dict.fromkeys(measure for item in stack.asking for measure in item.scores)
        kinds = dict.fromkeys(f"{item.head} head, {item.adapter} adapter" for item in exits)
        after = ", ".join(str(item.after) for item in exits)
        rows.append((name, stack.role, str(stack.blocks), after or "none", "; ".join(kinds), ", ".join(scores)))
    cached = "Keys and values are cached: it runs token by token." if manifest.cache else "It runs in one pass."
    table = _table(("stack", "role", "blocks", "exits after", "made by", "scores"), rows)
    return "\n\n".join(part for part in (table, _learners(manifest), cached) if part)


def _learners(manifest: Manifest) -> str:
    if not manifest.learners:
        return ""
    found = kinds(manifest).items()
    rows = [(stack, site, str(blocks), str(count), form) for (stack, site, count, form), blocks in found]
    table = _table(("stack", "site", "blocks", "learners", "form"), rows)
    return (
        f"{table}\n\nOf these learners a token takes as many as it needs: `Width(0.5)` lets them take half on average."
    )


def _policy(manifest: Manifest) -> str:
    from offramp.runtime.policies.builtin import from_dict

    policy = from_dict(manifest.policy) if manifest.policy else None
    text = f"`{policy}` unless asked otherwise." if policy else "At full depth unless a policy is given."
    found = manifest.calibration
    if not found:
        return f"{text} It is not calibrated: `offramp calibrate` chooses a policy on your examples."
    lines = [text, f"Calibrated on {found.get('examples')} examples (quality: {found.get('quality')})."]
    if found.get("reason"):
        lines.append(f"Nothing quicker was chosen: {found['reason']}.")
    if risk := found.get("risk"):
        lines.append(
            f"It keeps at least {found.get('keep'):g} of full depth's quality with confidence "
            f"{found.get('confidence'):g}: {risk['early']:.4f} against {risk['full']:.4f} on the test examples."
        )
    if times := found.get("milliseconds"):
        of = f" for each {found['step']}" if found.get("step") else ""
        lines.append(f"Expected {times['expected']:.3f} ms{of}, {times['full']:.3f} at full depth, where it was made.")
    return " ".join(lines)


def _settings(found: Any) -> Iterator[str]:
    """A line for each setting that is made, in words."""
    items = found if isinstance(found, Mapping) else {item.name: getattr(found, item.name) for item in fields(found)}
    for key, value in items.items():
        if isinstance(value, Mapping) or is_dataclass(value):
            inner = ", ".join(line.removeprefix("- ") for line in _settings(value))
            if inner:
                yield f"- {_words(key)}: {inner}"
        elif value is not False and value not in (None, (), [], ""):
            yield f"- {_words(key)} {_listed(value)}"


def _words(key: str) -> str:
    return key.replace("_", " ")


def _listed(value: object) -> str:
    if isinstance(value, str):
        return f"`{value!r}`"
    if not isinstance(value, list | tuple):
        return str(value)
    shown = ", ".join(map(_listed, value[:_SHOWN]))
    return f"{shown}, ... ({len(value)} in all)" if len(value) > _SHOWN else shown


def _validation(manifest: Manifest) -> str:
    rows = [
        (_FIGURES.get(key, key.replace("_", " ")), f"{error:.0e}" if error else "0")
        for key, error in manifest.validation.items()
        if key not in ("tolerance", ERROR, ANSWERS, EXITS) and isinstance(error, int | float)
    ]
    if not rows:
        return "It was not."
    table = _table(("what", "largest difference, of the output's scale"), rows)
    encoded = against_fp32(manifest)
    return f"{table}\n\nThat was in fp32. {encoded[0].upper()}{encoded[1:]}." if encoded else table


def _usage(manifest: Manifest, name: str) -> str:
    made = manifest.preprocessing
    how = "--audio FILE.wav" if made.audio else "--image FILE" if made.image else ""
    how = how or ("--text TEXT" if _TOKENIZER in manifest.files else "")
    how = how or " ".join(f"--input {item}=FILE.npy" for item in manifest.inputs)
    return f"```sh\nofframp run {name} {how}\n```\n\n```python\n{_python(manifest, name)}```"


def _python(manifest: Manifest, name: str) -> str:
    """Lines that run as they stand, on inputs that are made up."""
    cache = manifest.cache
    chunk = cache.tokens if cache else ()
    ids = next((item for item in chunk if manifest.values[item].dtype.startswith("int")), None)
    sizes = {
        axis: max(low, min(1 if axis == manifest.batch else _TOKENS, high or _TOKENS))
        for axis, (low, high) in manifest.axes.items()
    }
    kept = [(item.token, evaluate(item.count, sizes)) for item in manifest.placeholders if item.input == ids]
    if cache and cache.prompt:  # what is given for each token of the prompt
        sizes[str(manifest.values[cache.prompt.tokens].shape[1])] = sum(count for _, count in kept) + 2
    wanted = [item for item in manifest.inputs if item not in chunk]
    says = {mask for item in manifest.placeholders for mask in item.masks}
    lines = [_array(item, manifest.values[item], sizes, item in says) for item in wanted]
    if ids:
        places = "".join(f"[{token}] * {count} + " for token, count in kept)
        lines.append(f'    "{ids}": [{places}[1, 1]],  # token ids, as the tokenizer makes them')
    head = ["import numpy as np", "import offramp", "", f'model = offramp.load("{name}")', "inputs = {", *lines, "}"]
    if ids:
        run = ["generated = model.generate(inputs, max_new_tokens=4)", "print(generated.tokens, generated.exits)"]
    else:
        run = [
            "result = model.run(inputs)",
            "print({name: array.shape for name, array in result.outputs.items()}, result.exits)",
        ]
    return "\n".join([*head, *run]) + "\n"


def _array(name: str, value: Value, sizes: Mapping[str, int], whole: bool = False) -> str:
    shape = tuple(evaluate(size, sizes) for size in value.shape)
    hides = "padding" in name or value.dtype == "bool"
    made = "zeros" if not whole and (hides or value.dtype.startswith("float")) else "ones"
    return f'    "{name}": np.{made}({shape}, "{value.dtype}"),'


def _brief(text: str) -> str:
    """A pass without the ends of long lists."""
    return f"`{text if len(text) < 120 else text[:100] + '...'}`"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *([cell.replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
