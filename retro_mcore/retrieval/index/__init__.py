"""The Faiss index over the embeddings of the retrieval database.

The steps are embeddings, choice, training, filling (parts, merged into one index) and recall.
`faiss_search` searches the indexes that `files` reads.
"""

from retro_mcore.retrieval.index.choice import AUTO, IndexChoice, choose_index, parse_bytes
from retro_mcore.retrieval.index.embeddings import (
    Embeddings,
    HeldOut,
    embed_database,
    embed_held_out,
    read_held_out,
)
from retro_mcore.retrieval.index.faiss_search import search, set_search_breadth
from retro_mcore.retrieval.index.files import lists_path, load_index, load_parts, save_index
from retro_mcore.retrieval.index.filling import (
    add_part,
    add_to_index,
    cut_parts,
    merge_on_disk,
    merge_parts,
    stored_bytes,
)
from retro_mcore.retrieval.index.recall import (
    Recall,
    RecallMeasure,
    measure_recall,
    read_exact,
    tune,
    write_exact,
)
from retro_mcore.retrieval.index.training import (
    IndexKind,
    has_graph,
    kind_of,
    make_index,
    num_lists,
    train_index,
)

__all__ = [
    "AUTO",
    "Embeddings",
    "HeldOut",
    "IndexChoice",
    "IndexKind",
    "Recall",
    "RecallMeasure",
    "add_part",
    "add_to_index",
    "choose_index",
    "cut_parts",
    "embed_database",
    "embed_held_out",
    "has_graph",
    "kind_of",
    "lists_path",
    "load_index",
    "load_parts",
    "make_index",
    "measure_recall",
    "merge_on_disk",
    "merge_parts",
    "num_lists",
    "parse_bytes",
    "read_exact",
    "read_held_out",
    "save_index",
    "search",
    "set_search_breadth",
    "stored_bytes",
    "train_index",
    "tune",
    "write_exact",
]
