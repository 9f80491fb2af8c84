"""What a text's tokens are: bytes, characters, or those of a trained tokenizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cluster.references import DataError, is_file, is_folder

BOUNDARY, UNKNOWN = "<boundary>", "<unknown>"
#: What needs no tokenizer of one's own.
TOKENIZERS = ("bytes", "characters")
_FILE = "tokenizer.json"


class Tokenizer(ABC):
    """Turns a text into codes of its vocabulary, whose last one is the boundary.

    Attributes:
        vocabulary: What each code stands for.
    """

    vocabulary: list[str]

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Codes of a text, [tokens]."""


class Bytes(Tokenizer):
    """The 256 bytes of UTF-8."""

    def __init__(self) -> None:
        names = [chr(code) if 32 <= code < 127 else f"0x{code:02x}" for code in range(256)]
        self.vocabulary = [*names, BOUNDARY]

    def encode(self, text: str) -> np.ndarray:
        """See :class:`Tokenizer`."""
        return np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)


class Characters(Tokenizer):
    """The characters of the training split in the order of their code points, and one for all others.

    The others are foretold like any token: what no training text holds, a model pays for in full.

    Args:
        texts: Those of the training split.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        known = sorted(set().union(*texts))
        self.vocabulary = [*known, UNKNOWN, BOUNDARY]
        self._codes = {character: code for code, character in enumerate(known)}

    def encode(self, text: str) -> np.ndarray:
        """See :class:`Tokenizer`."""
        unknown = len(self._codes)
        return np.fromiter((self._codes.get(each, unknown) for each in text), np.int64, len(text))


class Trained(Tokenizer):
    """A tokenizer of the library tokenizers, which those of transformers are too.

    Its special tokens stay in the vocabulary and are never added to a text, nor is one padded or cut by it.

    Args:
        stored: One of the library's.
    """

    def __init__(self, stored: Any) -> None:
        stored.no_padding()
        stored.no_truncation()
        self._stored = stored
        names = {code: name for name, code in stored.get_vocab(with_added_tokens=True).items()}
        self.vocabulary = [names.get(code, f"<{code}>") for code in range(max(names) + 1)] + [BOUNDARY]

    def encode(self, text: str) -> np.ndarray:
        """See :class:`Tokenizer`."""
        return np.array(self._stored.encode(text, add_special_tokens=False).ids, np.int64)


def tokenizer_named(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer that ``data.tokenizer`` stands for.

    Args:
        name: One of ``TOKENIZERS``, a file, a folder with ``tokenizer.json``, or a hub repository.
        texts: The training split's.

    Raises:
        DataError: It cannot be read, or the library is not installed.
    """
    if name in TOKENIZERS:
        return Bytes() if name == "bytes" else Characters(texts)
    try:
        from tokenizers import Tokenizer as Stored
    except ModuleNotFoundError:
        raise DataError(
            f"data.tokenizer = {name!r} is read by the package tokenizers, which is not installed here; "
            "install it (pip install 'sparsyfed[text]'), or use bytes or characters"
        ) from None
    file = tokenizer_file(name)
    try:
        return Trained(Stored.from_pretrained(name) if file is None else Stored.from_file(str(file)))
    except Exception as error:  # the library raises bare ones, the hub's a dozen of its own
        reason = " ".join(str(error).split())
        raise DataError(
            f"data.tokenizer = {name!r} is no tokenizer of the library tokenizers ({reason})"
            if file is not None
            else f"data.tokenizer = {name!r} could not be loaded from the Hugging Face hub ({reason}); give "
            f"a local {_FILE}"
        ) from error


def tokenizer_file(name: str) -> Path | None:
    """The file that ``data.tokenizer`` stands for; None for what is in no local file.

    Raises:
        DataError: There is no such file, or the folder has none.
    """
    if name in TOKENIZERS or not (name.startswith("/") or is_file(name) or is_folder(name)):
        return None
    file = Path(name) / _FILE if is_folder(name) else Path(name)
    if not is_file(file):
        raise DataError(
            f"data.tokenizer = {name!r}: there is no file {file} on this node; allowed are a {_FILE}, as "
            "tokenizers and transformers (save_pretrained) write it, or a folder with one"
        )
    return file
