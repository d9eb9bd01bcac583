"""How long does an export take, how does it grow with depth, and how large is a bundle?"""

from __future__ import annotations

import time

import torch
from transformers import BertConfig, BertModel

import offramp
from benchmarks._common import BUILD, report
from offramp import zoo
from offramp.bundle.json_text import from_json
from offramp.bundle.manifest import MANIFEST_FILE
from offramp.program.graph import storage_key


def bert(blocks: int) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """MiniLM's shape with random weights and any number of blocks."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=blocks, num_attention_heads=12, intermediate_size=1536)
    ids = torch.randint(1000, 2000, (2, 12))
    return BertModel(config, add_pooling_layer=False).eval(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def main() -> None:
    """Print one table; the first export of a process pays for imports, so one is made before."""
    models = {name: zoo.load(name) for name in ("minilm", "vit", "albert")}
    models |= {f"bert, {blocks} blocks": bert(blocks) for blocks in (6, 12, 24)}
    warm, example = bert(2)
    offramp.save(offramp.capture(warm, example), BUILD / "warm.offramp")
    rows = []
    for name, (module, example) in models.items():
        begun = time.perf_counter()
        program = offramp.capture(module, example)
        captured = time.perf_counter()
        rewritten = offramp.apply(program, "insert-exits{after=all}")
        path = BUILD / f"time-{name.replace(', ', '-').replace(' ', '-')}.offramp"
        exporting = time.perf_counter()
        offramp.save(rewritten, path)
        done = time.perf_counter()
        manifest = from_json((path / MANIFEST_FILE).read_text())
        size = sum(file.stat().st_size for file in path.iterdir())
        unique = {storage_key(tensor): tensor.nbytes for tensor in module.parameters()}
        rows.append(
            {
                "model": name,
                "blocks": next(iter(program.stacks.values())).blocks,
                "capture s": captured - begun,
                "export s": done - exporting,
                "segments": len(manifest.segments),
                "files": len({segment.file for segment in manifest.segments.values()}),
                "bundle MB": size / 1e6,
                "bundle / parameters": round(size / sum(unique.values()), 4),
            }
        )
    report("export_time", "capture and export (with validation), every block a segment, an exit after each", rows)


if __name__ == "__main__":
    main()
