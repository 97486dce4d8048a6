"""The `retro-mcore` console script: `retro-mcore COMMAND [flags]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from retro_mcore.cli.output import closed_pipe_ends_quietly
from retro_mcore.cli.utf8 import use_utf8
from retro_mcore.errors import EXIT_CODE

COMMANDS = {
    "preprocess_corpus": "JSONL or text files into an indexed dataset",
    "build_db": "the chunk database",
    "build_index": "the Faiss index over the database's embeddings",
    "query_neighbors": "the neighbors of every training, validation and test chunk",
    "update_db": "more documents or another database to retrieve from, for the same samples",
    "set_samples": "other samples of the same documents: length, number, order, batch size",
    "plan_scale": "chunks, disk, memory and hours of a database that is not built yet",
    "inspect_neighbors": "a page that shows samples, their neighbors and the overlap of both",
    "pretrain_retro": "train a Retro model",
    "convert_checkpoint": "checkpoints of Megatron's Retro and of GPT models into ours, and back",
    "finetune_retro": "tune a Retro model on instructions and questions",
    "evaluate_perplexity": "perplexity, bits per byte and leakage, by kind of neighbors",
    "evaluate_qa": "answers to a test file's questions, scored",
    "generate": "text with live retrieval",
    "serve": "text with live retrieval over HTTP",
    "doctor": "whether a node, or all ranks of a job, are ready for a long run",
    "verify": "whether the files of a project or of checkpoints are what was written",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the named command with the remaining arguments; returns its exit code."""
    if argv is None:
        use_utf8()
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = arguments[0].replace("-", "_") if arguments else "help"
    if name in COMMANDS:
        return int(import_module(f"retro_mcore.cli.{name}").main(arguments[1:]))
    with closed_pipe_ends_quietly():
        print("usage: retro-mcore COMMAND [flags]; `retro-mcore COMMAND --help` lists the flags\n")
        for command, summary in COMMANDS.items():
            print(f"  {command:20} {summary}")
    return 0 if name in ("help", "__help", "_h") else EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
