"""Names of stacks, from the module paths of their blocks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from offramp.program.analysis.stacks import Found, Stack
from offramp.program.dropout import keeps
from offramp.program.graph import weights

_GENERIC = re.compile(
    r"\d+|(hidden_)?(layers?|blocks?|h|stages?|groups?|modules?|model|transformer|net|network)(_\w+)?"
)


def name_stacks(found: Sequence[Found], causal: Sequence[bool]) -> dict[str, Stack]:
    """Names from module paths (``encoder`` where a path says so or none does), numbered where they agree."""
    paths = [_path(stack) for stack in found]
    roles = ["decoder" if flag else "encoder" for flag in causal]
    named = [_name(path, role) for path, role in zip(paths, roles, strict=True)]
    for i, name in enumerate(named):
        if named.count(name) > 1:  # tell them apart by the module above, if that does
            words = [word for word in paths[i].split(".") if word != name and not _GENERIC.fullmatch(word)]
            others = {path for j, path in enumerate(paths) if j != i}
            telling = [word for word in words if not any(word in other.split(".") for other in others)]
            named[i] = telling[-1] if telling else name
    total = Counter(named)
    counts: Counter[str] = Counter()
    stacks: dict[str, Stack] = {}
    for stack, path, role, name in zip(found, paths, roles, named, strict=True):
        numbered = f"{name}{counts[name]}" if total[name] > 1 or name == "stack" else name
        counts[name] += 1
        stacks[numbered] = Stack(numbered, role, tuple(node.name for node in stack.cuts), path)
    return stacks


def _name(path: str, role: str) -> str:
    if not path:
        return "stack"
    roles = [word for word in path.split(".") if re.search("encoder|decoder", word)]
    return roles[-1] if roles else role


def _path(stack: Found) -> str:
    """The module path that holds the blocks: the longest prefix that most nodes of all blocks share."""
    paths = []
    for block in stack.blocks:
        counts: Counter[str] = Counter()
        for node in block:
            modules = [] if keeps(node) else list((node.meta.get("nn_module_stack") or {}).values())
            for weight in weights(node):
                counts[str(weight.target).rpartition(".")[0]] += 1
            if modules:
                counts[str(modules[-1][0])] += 1
        paths += [path for path, _ in counts.most_common()]
    if not paths:
        return ""
    split = [path.split(".") for path in paths if path]
    prefix = []
    for level in range(max(map(len, split), default=0)):
        word, count = Counter(parts[level] for parts in split if len(parts) > level).most_common(1)[0]
        if count < 0.9 * len(split) or word.isdigit():
            break
        prefix.append(word)
    return ".".join(prefix)
