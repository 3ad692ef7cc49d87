"""A byte-level BPE tokenizer in pure Python: any bytes encode, and decode to the same bytes."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

__all__ = ["Tokenizer", "train"]

# Pieces that merges never cross: a line break with its indentation; a word with one leading space or
# underscore; a digit; a run of underscores; spaces before the last; punctuation; and any single byte.
_PIECES = re.compile(rb"\n+ *|[ _]?[A-Za-z]+| ?[0-9]|_+| +(?= )|[ ]?[^\sA-Za-z0-9_\x80-\xff]+|[\x80-\xff]+|[\x00-\xff]")


class Tokenizer:
    """Byte-pair encoding over raw bytes.

    Ids 0 to 255 are the bytes, id ``256 + i`` is the ``i``-th merge, and the last id, :attr:`bos`, marks the
    start of a document; it stands for no bytes and is never produced by :meth:`encode`.
    """

    def __init__(self, merges: Sequence[tuple[int, int]]) -> None:
        """Build from ``merges``, pairs of ids in the order they were learned."""
        self.merges: tuple[tuple[int, int], ...] = tuple((int(left), int(right)) for left, right in merges)
        self._ids = {pair: 256 + rank for rank, pair in enumerate(self.merges)}
        self._bytes = [bytes([value]) for value in range(256)]
        for left, right in self.merges:
            if not (0 <= left < len(self._bytes) and 0 <= right < len(self._bytes)):
                raise ValueError(f"merge ({left}, {right}) names an id that no earlier merge made")
            self._bytes.append(self._bytes[left] + self._bytes[right])
        self._cache: dict[bytes, tuple[int, ...]] = {}

    @property
    def bos(self) -> int:
        """The id that starts a document."""
        return len(self._bytes)

    @property
    def vocab_size(self) -> int:
        """The number of ids, :attr:`bos` included."""
        return len(self._bytes) + 1

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of ``text``; a string is taken as UTF-8 (lone surrogates pass through)."""
        data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
        ids: list[int] = []
        for match in _PIECES.finditer(data):
            piece = match.group()
            known = self._cache.get(piece)
            if known is None:
                known = self._merge(piece)
                if len(self._cache) < 1 << 16:
                    self._cache[piece] = known
            ids.extend(known)
        return ids

    def _merge(self, piece: bytes) -> tuple[int, ...]:
        """Apply the merges to one piece, earliest learned first."""
        ids = list(piece)
        while len(ids) > 1:
            best = min(self._ids.get(pair, 1 << 30) for pair in pairwise(ids))
            if best == 1 << 30:
                break
            ids = _replace(ids, self.merges[best - 256], best)
        return tuple(ids)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of ``ids``; :attr:`bos` contributes none, an id out of range raises ``ValueError``."""
        parts = []
        for value in ids:
            if not 0 <= value <= self.bos:
                raise ValueError(f"token id {value} is not in 0..{self.bos}")
            if value != self.bos:
                parts.append(self._bytes[value])
        return b"".join(parts)

    def decode(self, ids: Iterable[int]) -> str:
        """Return ``ids`` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def save(self, path: str | Path) -> None:
        """Write the merges to ``path`` as JSON."""
        rows = ",\n".join(
            " " + ", ".join(json.dumps(pair) for pair in self.merges[start : start + 12])
            for start in range(0, len(self.merges), 12)
        )
        Path(path).write_text(f'{{"type": "byte-level-bpe", "merges": [\n{rows}\n]}}\n', encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer that :meth:`save` wrote."""
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if record.get("type") != "byte-level-bpe":
            raise ValueError(f"{path} is not a byte-level BPE record")
        return cls([(left, right) for left, right in record["merges"]])


def _replace(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of ``pair`` in ``ids``, left to right."""
    out: list[int] = []
    index, last = 0, len(ids) - 1
    while index <= last:
        if index < last and ids[index] == pair[0] and ids[index + 1] == pair[1]:
            out.append(new)
            index += 2
        else:
            out.append(ids[index])
            index += 1
    return out


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn merges from ``texts`` until the vocabulary, bytes and start mark included, has ``vocab_size`` ids.

    Ties go to the pair with the smaller ids, so the result depends on the texts alone. Fewer merges come
    back when the texts run out of repeated pairs.
    """
    if vocab_size < 257:
        raise ValueError(f"vocab_size must be at least 257, not {vocab_size}")
    pieces: Counter[bytes] = Counter()
    for text in texts:
        pieces.update(match.group() for match in _PIECES.finditer(text.encode("utf-8", "surrogatepass")))
    words = [list(piece) for piece in sorted(pieces)]
    weights = [pieces[piece] for piece in sorted(pieces)]
    counts: Counter[tuple[int, int]] = Counter()
    where: defaultdict[tuple[int, int], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in pairwise(word):
            counts[pair] += weights[index]
            where[pair].add(index)
    merges: list[tuple[int, int]] = []
    while len(merges) < vocab_size - 257 and counts:
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        if counts[best] < 2:
            break
        new = 256 + len(merges)
        merges.append(best)
        for index in sorted(where.pop(best)):
            word = words[index]
            for pair in pairwise(word):
                counts[pair] -= weights[index]
                if counts[pair] <= 0:
                    del counts[pair]
            words[index] = word = _replace(word, best, new)
            for pair in pairwise(word):
                counts[pair] += weights[index]
                where[pair].add(index)
        counts.pop(best, None)
    return Tokenizer(merges)
