"""What a corpus is called in a project, and whether it is still the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retro_mcore.data.corpus import list_files
from retro_mcore.data.token_file import bin_path, idx_path
from retro_mcore.data.token_input import find_token_input
from retro_mcore.project.markers import checksum, fingerprint_of


def digest_of_source(source: Path) -> str:
    """A digest of a corpus's files: their names below it and their bytes.

    Raises:
        CorpusError: there is no such corpus.
    """
    if (prefix := find_token_input(source)) is not None:
        return fingerprint_of([checksum(bin_path(prefix)), checksum(idx_path(prefix))])
    files = list_files(source)
    root = source if source.is_dir() else source.parent
    return fingerprint_of([[str(file.relative_to(root)), checksum(file)] for file in files])


def name_datasets(
    sources: Sequence[Path], json_keys: Sequence[str], taken: Sequence[str] = ()
) -> list[str]:
    """`<name>_<keys>_document` as Megatron names its datasets, told apart by a number.

    Tokens that were made elsewhere keep their name.

    Args:
        sources: Corpora.
        json_keys: Keys of a JSON line that hold the text.
        taken: Names that others have already.
    """
    prefixes: list[str] = []
    for source in sources:
        given = find_token_input(source)
        name = source.stem.removesuffix(".jsonl").removesuffix(".json")
        prefix = base = given.name if given else f"{name}_{'_'.join(json_keys)}_document"
        number = 2
        while prefix in (*taken, *prefixes):
            prefix, number = f"{base}_{number}", number + 1
        prefixes.append(prefix)
    return prefixes
