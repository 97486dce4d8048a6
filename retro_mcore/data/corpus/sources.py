"""Names of a project's corpora, and digests that detect changes in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from retro_mcore.data.corpus.files import find_corpus_files
from retro_mcore.data.tokens.document_ids import ids_path
from retro_mcore.data.tokens.token_file import bin_path, idx_path
from retro_mcore.data.tokens.token_input import find_token_input
from retro_mcore.errors import CorpusError
from retro_mcore.json_text import replace_surrogates
from retro_mcore.project.markers import checksum, fingerprint_of


def digest_of_source(source: Path, before_ids: bool = False) -> str:
    """Digest of a corpus: the relative names of its files and their bytes.

    Args:
        source: The corpus.
        before_ids: Omit the document ids of a .bin and .idx pair, as earlier versions did.

    Raises:
        CorpusError: there is no such corpus, or it cannot be read.
    """
    try:
        if (prefix := find_token_input(source)) is None:
            return _digest_of_text(source)
        pair = [checksum(bin_path(prefix)), checksum(idx_path(prefix))]
        if before_ids:
            return fingerprint_of(pair)
        ids = ids_path(prefix)
        return fingerprint_of([*pair, checksum(ids) if ids.is_file() else None])
    except OSError as error:
        raise CorpusError(
            error.filename or source,
            f"cannot be read ({error.strerror})",
            "Check the file and its permissions",
        ) from error


def _digest_of_text(source: Path) -> str:
    root = source if source.is_dir() else source.parent
    files = find_corpus_files(source).files
    return fingerprint_of([[str(file.relative_to(root)), checksum(file)] for file in files])


def digest_inputs(sources: Sequence[Path], recorded: Mapping[str, str]) -> dict[str, str]:
    """Digest of each corpus, by the flag that names it.

    Corpora with the same name in different folders are numbered in order.

    Args:
        sources: The corpora.
        recorded: Digests of an earlier run. If a recorded digest omits the document ids of a .bin
            and .idx pair, as earlier versions did, the new one omits them too.

    Raises:
        CorpusError: there is no such corpus, or it cannot be read.
    """
    digests: dict[str, str] = {}
    for source in sources:
        base = name = f"--input {source.name}"
        number = 2
        while name in digests:
            name, number = f"{base} ({number})", number + 1
        digests[name] = digest_of_source(source)
        if name in recorded and recorded[name] != digests[name] and find_token_input(source):
            earlier = digest_of_source(source, before_ids=True)
            digests[name] = earlier if earlier == recorded[name] else digests[name]
    return digests


def name_datasets(
    sources: Sequence[Path], json_keys: Sequence[str], taken: Sequence[str] = ()
) -> list[str]:
    """Dataset names in Megatron's form `<name>_<keys>_document`, numbered where they collide.

    Datasets that were already tokenized keep their name.

    Args:
        sources: Corpora.
        json_keys: Keys of a JSON line that hold the text.
        taken: Names that are already in use.
    """
    prefixes: list[str] = []
    for source in sources:
        given = find_token_input(source)
        name = source.stem.removesuffix(".jsonl").removesuffix(".json")
        name = given.name if given else f"{name}_{'_'.join(json_keys)}_document"
        # A file name may hold any bytes, but config.json holds text.
        prefix = base = replace_surrogates(name)[0]
        number = 2
        while prefix in (*taken, *prefixes):
            prefix, number = f"{base}_{number}", number + 1
        prefixes.append(prefix)
    return prefixes
