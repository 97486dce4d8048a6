"""Choose the tokens that begin and end a document, from what a tokenizer's directory declares.

Hugging Face directories declare them in several files. Declarations take precedence over
well-known names. A token that text can produce is never chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retro_mcore.errors import TokenizerError
from retro_mcore.json_text import JsonError, RepeatedKeyError, parse_json
from retro_mcore.project.markers import fingerprint_of

END_OF_TEXT = "<|endoftext|>"
#: Files that declare special tokens, most authoritative first.
DECLARING_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "config.json",
)
#: Files of a tokenizer's directory that a project keeps copies of.
KEPT_FILES = (*DECLARING_FILES, "chat_template.jinja")
#: Special tokens of well-known tokenizers, used if the files declare none.
_EOD_NAMES = (
    END_OF_TEXT,
    "</s>",
    "<|end_of_text|>",
    "<eos>",
    "<|eos|>",
    "<EOD>",
    "[EOD]",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[SEP]",
)
_BOS_NAMES = (
    "<s>",
    "<|begin_of_text|>",
    "<bos>",
    "<|bos|>",
    "[BOS]",
    "<|startoftext|>",
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
)
_ROLES = ("bos_token", "eos_token", "pad_token", "cls_token", "sep_token", "mask_token")


@dataclass(frozen=True)
class SpecialTokenChoice:
    """Requested or recorded special tokens; None: as declared by the tokenizer's files.

    Attributes:
        eod: The end-of-document token, as text or id.
        bos: The beginning-of-sequence token, as text or id.
        add_bos: Whether documents and prompts begin with BOS.
        first_known_eod: Choose EOD by well-known name only, as earlier versions did.
        own_eod: Prefer the tokenizer's own file to its directory, as Megatron does.
    """

    eod: str | int | None = None
    bos: str | int | None = None
    add_bos: bool | None = None
    first_known_eod: bool = False
    own_eod: bool = False


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary information needed to choose special tokens.

    Attributes:
        file: File it was loaded from, for error messages.
        id_of: Id of a token; None if it has no such token.
        size: Upper bound of the ids, exclusive.
        names: Text of each special token by id; of added tokens, only those marked special.
        own_eod: EOD according to the tokenizer's own file, if that file can declare it.
        own_bos: BOS according to the tokenizer's own file, likewise.
    """

    file: Path
    id_of: Callable[[str], int | None]
    size: int
    names: Mapping[int, str] = field(default_factory=dict)
    own_eod: int | None = None
    own_bos: int | None = None


@dataclass(frozen=True)
class DeclaredTokens:
    """Special tokens declared by the files of a directory.

    Attributes:
        directory: The directory.
        tokens: For each role ("eos_token"), the declaring file and the token; None: no such token.
        ids: For "eos_token_id" and "bos_token_id", each declaring file with its ids.
        add_bos: `add_bos_token`; None: not declared.
        special: Text of every token declared special.
        not_special: Text of every added token declared not special.
        pad_ids: Ids of the padding token in the model's configurations.
    """

    directory: Path
    tokens: Mapping[str, tuple[str, str | None]]
    ids: Mapping[str, list[tuple[str, list[int]]]]
    add_bos: bool | None
    special: frozenset[str]
    not_special: frozenset[str]
    pad_ids: tuple[int, ...] = ()

    @classmethod
    def read(cls, directory: Path) -> DeclaredTokens:
        """Read the files in `directory`; empty if there are none.

        Raises:
            TokenizerError: a file is not a JSON object, or declares a token that is not text.
        """
        tokens: dict[str, tuple[str, str | None]] = {}
        special: set[str] = set()
        not_special: set[str] = set()
        add_bos: bool | None = None
        for name in DECLARING_FILES[:2]:
            values = _read_object(directory / name)
            for role in _ROLES:
                if role in values:
                    tokens.setdefault(role, (name, _content(directory / name, role, values[role])))
            if add_bos is None and isinstance(values.get("add_bos_token"), bool):
                add_bos = values["add_bos_token"]
            special |= _more_special(values)
            for added in _added_tokens(values):
                (special if added.get("special") else not_special).add(str(added.get("content")))
        special |= {token for _, token in tokens.values() if token is not None}
        ids: dict[str, list[tuple[str, list[int]]]] = {}
        pad_ids: list[int] = []
        for name in DECLARING_FILES[2:]:
            values = _read_object(directory / name, strict=False)
            for role in ("eos_token_id", "bos_token_id"):
                if found := _ids(values.get(role)):
                    ids.setdefault(role, []).append((name, found))
            pad_ids += _ids(values.get("pad_token_id"))
        ordinary = frozenset(not_special - special)
        return cls(directory, tokens, ids, add_bos, frozenset(special), ordinary, tuple(pad_ids))

    def __bool__(self) -> bool:
        """Whether anything is declared."""
        said = self.tokens or self.ids or self.special or self.not_special
        return bool(said) or self.add_bos is not None

    @property
    def digest(self) -> str:
        """Digest of the declarations, independent of the directory."""
        tokens = {role: token for role, (_, token) in sorted(self.tokens.items())}
        ids = {role: [each for _, each in given] for role, given in sorted(self.ids.items())}
        more = [self.add_bos, sorted(self.special), sorted(self.not_special)]
        return fingerprint_of([tokens, ids, *more])


def choose_eod(choice: SpecialTokenChoice, declared: DeclaredTokens, vocabulary: Vocabulary) -> int:
    """Choose the id of the end-of-document token.

    In order of precedence: the requested token, the token declared by the directory, the special
    token with a well-known name.

    Raises:
        TokenizerError: the named token does not exist, or not exactly one has a well-known name.
    """
    if choice.eod is not None:
        return _asked("--eod-token", choice.eod, vocabulary)
    if choice.first_known_eod and (first := _first_known(vocabulary)) is not None:
        return first
    named = _declared_token("eos", declared, vocabulary)
    own = vocabulary.own_eod
    if named is None and not (choice.own_eod and own is not None):
        _refuse_missing(declared, vocabulary)
    for found in (own, named) if choice.own_eod else (named, own):
        if found is not None:
            return found
    found = _declared_id("eos", declared, vocabulary)
    if found is not None:
        return found
    known = _known(_EOD_NAMES, vocabulary)
    if not known:
        # GPT-2's own vocabulary has it as an ordinary entry that no merge leads to.
        last = vocabulary.id_of(END_OF_TEXT)
        if last is not None and END_OF_TEXT not in declared.not_special:
            known = [last]
    if len(known) != 1:
        raise _undecided(known, vocabulary)
    return known[0]


def choose_bos(
    choice: SpecialTokenChoice,
    declared: DeclaredTokens,
    vocabulary: Vocabulary,
    prefix: int | None = None,
) -> int | None:
    """Choose the id of the beginning-of-sequence token; None if the tokenizer has none.

    Args:
        choice: The requested special tokens.
        declared: The special tokens declared by the directory.
        vocabulary: The tokenizer's tokens.
        prefix: The token that the tokenizer itself puts before a text, if it puts one there.

    Raises:
        TokenizerError: the requested token does not exist.
    """
    if choice.bos is not None:
        return _asked("--bos-token", choice.bos, vocabulary)
    if "bos_token" in declared.tokens and declared.tokens["bos_token"][1] is None:
        return None
    named = _declared_token("bos", declared, vocabulary)
    if named is None and "bos_token" in declared.tokens:
        return prefix  # the directory's is not here, and another one would be a guess
    for found in (named, vocabulary.own_bos, _declared_id("bos", declared, vocabulary)):
        if found is not None:
            return found
    known = _known(_BOS_NAMES, vocabulary)
    if prefix is not None and (prefix in known or not known):
        return prefix
    return known[0] if len(known) == 1 else None


def adds_bos(
    choice: SpecialTokenChoice, declared: DeclaredTokens, bos: int | None, prefix: int | None
) -> bool:
    """Whether texts begin with BOS: as requested, else as declared, else as the tokenizer does.

    Raises:
        TokenizerError: BOS is requested or declared, but there is no such token.
    """
    if choice.add_bos and bos is None:
        raise TokenizerError(
            "--add-bos-token", "given, but the tokenizer has no BOS", "Name it with --bos-token"
        )
    if choice.add_bos is not None:
        return choice.add_bos
    if bos is None:
        if declared.add_bos:
            raise TokenizerError(
                declared.directory,
                "says add_bos_token, but the tokenizer has no such BOS",
                "Name it with --bos-token, or give --add-bos-token False",
            )
        return False
    return declared.add_bos if declared.add_bos is not None else prefix == bos


def _asked(flag: str, token: str | int, vocabulary: Vocabulary) -> int:
    found = token if isinstance(token, int) else vocabulary.id_of(token)
    if found is None and isinstance(token, str) and token.isdecimal() and len(token) < 10:
        found = int(token)
    if found is None or not 0 <= found < vocabulary.size:
        raise TokenizerError(
            f"{flag} {token}",
            f"{vocabulary.file} has no such token",
            f"Name one of its tokens, or an id below {vocabulary.size}{_listed(vocabulary)}",
        )
    return found


def _declared_token(role: str, declared: DeclaredTokens, vocabulary: Vocabulary) -> int | None:
    _, token = declared.tokens.get(f"{role}_token", ("", None))
    return None if token is None else vocabulary.id_of(token)


def _declared_id(role: str, declared: DeclaredTokens, vocabulary: Vocabulary) -> int | None:
    """The id in a model's configuration, if it is special; its defaults may name any token."""
    ids = (each for _, given in declared.ids.get(f"{role}_token_id", []) for each in given)
    return next((each for each in ids if each in vocabulary.names), None)


def _refuse_missing(declared: DeclaredTokens, vocabulary: Vocabulary) -> None:
    name, token = declared.tokens.get("eos_token", ("", None))
    if token is not None:
        raise TokenizerError(
            declared.directory / name,
            f"names {token!r} as eos_token, which {vocabulary.file.name} does not hold",
            f"Restore the files, or choose with --eod-token{_listed(vocabulary)}",
        )


def _known(names: tuple[str, ...], vocabulary: Vocabulary) -> list[int]:
    by_text = {text: token for token, text in vocabulary.names.items()}
    return [by_text[name] for name in names if name in by_text]


def _first_known(vocabulary: Vocabulary) -> int | None:
    """The first token with a name known to early versions, special or not."""
    names = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<EOD>", "[EOD]", "[SEP]")
    found = (vocabulary.id_of(name) for name in names)
    return next((each for each in found if each is not None), None)


def _undecided(known: list[int], vocabulary: Vocabulary) -> TokenizerError:
    if known:
        names = ", ".join(f"{vocabulary.names[each]} ({each})" for each in known)
        found = f"does not say which of its special tokens ends a document: {names}"
    else:
        found = "has no special token that is known to end a document"
    return TokenizerError(
        vocabulary.file, found, f"Choose it with --eod-token TOKEN{_listed(vocabulary)}"
    )


def _listed(vocabulary: Vocabulary) -> str:
    """The first special tokens that may be chosen, for error hints."""
    if not vocabulary.names:
        return ""
    names = [f"{text} ({token})" for token, text in sorted(vocabulary.names.items())]
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f". Its special tokens: {', '.join(names[:8])}{more}"


def _read_object(path: Path, strict: bool = True) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = parse_json(path.read_bytes(), allow_nan=True, unique_keys=True)
        if not isinstance(values, dict):
            raise JsonError("not a JSON object")
    except (OSError, JsonError) as error:
        # A malformed model configuration is otherwise reported by the command that needs it.
        if not strict and not isinstance(error, RepeatedKeyError):
            return {}
        raise TokenizerError(path, str(error), "Restore the file") from error
    return values


def _content(path: Path, role: str, value: Any) -> str | None:
    """The token's text, given directly or as "content" of an object."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value or None
    raise TokenizerError(path, f"{role} is {value!r}", "Expected a token's text")


def _ids(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [each for each in values if isinstance(each, int) and not isinstance(each, bool)]


def _added_tokens(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    added = values.get("added_tokens_decoder")
    if not isinstance(added, dict):
        return []
    return [each for each in added.values() if isinstance(each, dict)]


def _more_special(values: Mapping[str, Any]) -> set[str]:
    more: list[Any] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        given = values.get(key)
        if isinstance(given, (list, dict)):
            more += given.values() if isinstance(given, dict) else given
    texts = (each.get("content") if isinstance(each, dict) else each for each in more)
    return {text for text in texts if isinstance(text, str) and text}
