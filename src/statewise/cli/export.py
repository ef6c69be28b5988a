"""statewise export: one step of a trained run, for other runtimes; or all of it, for Hugging Face."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .parse import Positional


@dataclass(frozen=True)
class Options:
    """Write one step of a trained model to a file: states are named inputs and outputs, and any batch will do.

    Feed zeros (or what the metadata of the file says) as the first state, and each time the `next.` outputs of the
    step before.
    """

    run: Positional[Path]
    """A run of `statewise train`."""
    format: Literal["onnx", "torch", "hf"] = "onnx"
    """onnx: for onnxruntime and others. torch: a torch.export program. hf: weights and tokenizer of a language model as
    a directory for Hugging Face."""
    out: Path = Path("model.onnx")
    """The file to write; with hf the directory."""


def run(options: Options) -> int:
    from ..core.files import shown
    from ..report import show_bytes
    from ..serving import export_step
    from ..training import load

    if options.format == "hf":
        from ..core import UsageError
        from ..hf import export_run

        if options.out == Options.out:
            raise UsageError("export: --format hf writes a directory; say --out DIR")
        export_run(options.run, options.out)
        print(f"{shown(options.out)}: {', '.join(sorted(file.name for file in options.out.iterdir()))}")
        return 0
    model, _ = load(options.run)
    described = export_step(model, options.out, format=options.format)
    takes = "ids (B,)" if model.vocab else f"numbers (B, {model.width})"
    print(f"{shown(options.out)}: {show_bytes(options.out.stat().st_size)}; x is {takes}, y (B, {model.out_width})")
    for name, row in described["state"].items():
        start = row["start"] if not isinstance(row["start"], list) else "see its metadata"
        print(f"  {name:<24} ({', '.join(['B', *map(str, row['shape'])])}) {row['dtype']}, starts as {start}")
    return 0
