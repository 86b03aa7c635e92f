"""Text to domain embeddings: one fixed vector that says what an expert's documents are about.

    d = (1 / n) sum over documents i of embedder(document i)        (m,)

A router is started from them (FlexOlmo, arXiv 2507.07024, section 3) or projects them to its rows
(Nexus, arXiv 2408.15901, section 2). An embedder is any callable: texts to a tensor (n, m), one
row a text. The mean is not normalised, and is not changed afterwards.
"""

from __future__ import annotations

import re
import string
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .checkpoint_writer import write_tensors
from .checks import FLOATS, check_int, check_tensor
from .progress import Progress

Embedder = Callable[[Sequence[str]], Tensor]
_FORMAT = "flexmore domain embeddings"
_GRAMS = (3, 4, 5)  # lengths of the runs of characters that are features, beside whole words
_UNIT = 1 << 12  # of a feature's weight: sums of whole numbers are exact in any order
_LOWER = str.maketrans(string.ascii_uppercase, string.ascii_lowercase)
_SPACE = re.compile(r"[ \t\n\r\f\v]+")
_WORD = re.compile("[0-9a-z\x80-\U0010ffff]+")


class HashingEmbedder:
    """Which words and character sequences a text has, hashed into `size` numbers; no model.

    Features are a text's words and its runs of 3, 4 and 5 characters, ASCII letters in lower case
    and white space as one blank. Each has a place j and a sign s by its hash, and

        v_j = sum over the features at j of s sqrt(how often it occurs),    v / |v|

    so texts that share many words and spellings have a large cosine, about 1 / sqrt(size) off what
    all features would give (signed feature hashing: Weinberger et al., arXiv 0902.2206).

    What it is not: it has no semantics. Synonyms are different words to it, a text in another
    language is another domain, and word order beyond a few characters is lost. It tells code from
    prose and law from verse; for finer domains take `sentence_transformer`, or your own.

    Args:
        size: m, the width of the embeddings.
        seed: of places and signs; embeddings of different seeds or sizes do not compare.

    Called with texts, returns (n, size) float32 on the CPU, rows of length 1. The same bits on
    every machine: hashes are fixed, sums are of integers, and of rounded operations there are only
    square roots and divisions, which IEEE fixes. About half a millisecond for 2 KB of text. Raises
    ValueError for a text without a character that is not white space.
    """

    def __init__(self, size: int = 256, *, seed: int = 0) -> None:
        self.size = check_int("size", size, 1)
        self.seed = check_int("seed", seed, 0, 2**63 - 1)

    def __call__(self, documents: Sequence[str]) -> Tensor:
        check_documents(documents)
        return torch.from_numpy(np.stack([self._embed(text) for text in documents]))

    def __repr__(self) -> str:
        return f"HashingEmbedder(size={self.size}, seed={self.seed})"

    def _embed(self, text: str) -> np.ndarray:
        features, counts = np.unique(_features(text), return_counts=True)
        mixed = _mix(features + _mix(np.array([self.seed], np.uint64)))
        place = (mixed % np.uint64(self.size)).astype(np.int64)
        weight = np.floor(np.sqrt(counts) * _UNIT)
        weight[mixed >> np.uint64(63) == 1] *= -1
        sums = np.bincount(place, weight, self.size).astype(np.int64)
        if not sums.any():  # the few features of a tiny text may cancel: one of them stands then
            sums[place[0]] = 1
        return (sums / np.sqrt(np.float64((sums * sums).sum()))).astype(np.float32)


def sentence_transformer(name: str, *, device: str | None = None) -> Embedder:
    """An embedder by a model of the sentence-transformers package, a name or a directory.

    Not normalised unless the model does so itself. Weights are read from safetensors alone. Raises
    ValueError where the package is missing.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(
            f"sentence_transformer: got {name!r}, which needs `pip install sentence-transformers`; "
            "accepted without it: HashingEmbedder(), or a callable of your own"
        ) from None
    model = SentenceTransformer(name, device=device, model_kwargs={"use_safetensors": True})

    def embed(documents: Sequence[str]) -> Tensor:
        found = model.encode(list(documents), convert_to_tensor=True, show_progress_bar=False)
        return found.detach().float().cpu()

    return embed


def domain_embedding(
    documents: Sequence[str],
    embedder: Embedder | None = None,
    *,
    batch: int = 64,
    say: Callable[[str], None] | None = None,
) -> Tensor:
    """The domain embedding of documents: the mean of what the embedder makes of each, (m,) float32.

    FlexOlmo takes 1,000 documents a source (section 3). Summed in float64, in order, on the CPU;
    as deterministic as the embedder.

    Args:
        documents: texts, each with more than white space.
        embedder: texts to (n, m), a row a text, finite; None: `HashingEmbedder()`.
        batch: texts a call.
        say: is told how far it is.

    Raises ValueError or TypeError: no documents, empty text, an embedder that gives other shapes,
    another width than before, NaN or Inf.
    """
    check_documents(documents)
    check_int("batch", batch, 1)
    embedder = HashingEmbedder() if embedder is None else embedder
    progress, total = Progress(len(documents), say), None
    for start in range(0, len(documents), batch):
        texts = documents[start : start + batch]
        with torch.no_grad():
            found = embedder(texts)
        width = "m" if total is None else total.shape[0]
        check_tensor("embedder", found, (len(texts), width), FLOATS)
        if not found.shape[1]:
            raise ValueError("embedder: got rows of no number; accepted: (n, m) with m >= 1")
        rows = found.detach().cpu().double()
        bad = ~rows.isfinite().all(1)
        if bool(bad.any()):
            where = start + int(bad.nonzero()[0])
            raise ValueError(f"embedder: got NaN or Inf for documents[{where}]; accepted: numbers")
        total = rows.sum(0) if total is None else total.add_(rows.sum(0))
        progress.done(len(texts), f"{start + len(texts)} of {len(documents)} documents")
    return (total / len(documents)).float()


def check_documents(documents: Any) -> None:
    """Check a sequence of texts that are not empty; ValueError or TypeError says which is not."""
    if isinstance(documents, (str, bytes)) or not isinstance(documents, Sequence):
        got = type(documents).__name__
        raise TypeError(f"documents: got {got}; accepted: a sequence of texts")
    if not documents:
        raise ValueError("documents: got none; accepted: one text or more")
    for number, text in enumerate(documents):
        if not isinstance(text, str):
            got = type(text).__name__
            raise TypeError(f"documents[{number}]: got {got}; accepted: a text (str)")
        if not text or text.isspace():
            raise ValueError(
                f"documents[{number}]: got empty text; accepted: more than white space"
            )


def save_embeddings(
    path: str | Path, embeddings: Mapping[str, Tensor], *, embedder: str = ""
) -> None:
    """Write embeddings, name to vector (m,), as one safetensors file, whole or not at all.

    embedder: a name of what made them, kept in the file's header. Raises ValueError or TypeError
    for no embedding, another width, or NaN.
    """
    vectors = check_embeddings(embeddings)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, vectors, content=_FORMAT, embedder=embedder)


def load_embeddings(path: str | Path) -> dict[str, Tensor]:
    """Embeddings by name, (m,) float32: of a file that `save_embeddings` wrote, or of .npy.

    A .npy file holds one vector, and its name is the file's; a directory of them gives one each,
    as FlexOlmo's repository keeps them. Nothing is unpickled. Raises ValueError for anything else,
    another width, or NaN; FileNotFoundError.
    """
    path = Path(path)
    if path.is_dir() or path.suffix == ".npy":
        files = sorted(path.glob("*.npy")) if path.is_dir() else [path]
        return check_embeddings({file.stem: _vector(file) for file in files}, str(path))
    if not path.is_file():
        raise FileNotFoundError(f"embeddings: no file {path}")
    try:
        with safe_open(path, framework="pt") as opened:
            names = list(opened.keys())
            return check_embeddings({name: opened.get_tensor(name) for name in names}, str(path))
    except SafetensorError as fault:
        raise ValueError(
            f"embeddings: {path} is no whole safetensors file ({fault}); accepted: what `flexmore "
            "embed` writes, or .npy"
        ) from None


def check_embeddings(
    embeddings: Mapping[str, Tensor], name: str = "embeddings"
) -> dict[str, Tensor]:
    """Check vectors of one width, finite, and return them as float32 on the CPU."""
    if not isinstance(embeddings, Mapping) or not embeddings:
        got = "none" if isinstance(embeddings, Mapping) else type(embeddings).__name__
        raise ValueError(f"{name}: got {got}; accepted: a name and a vector (m,), once or more")
    vectors, width = {}, "m"
    for key, vector in embeddings.items():
        check_tensor(f"{name}[{key!r}]", vector, (width,), FLOATS)
        width = vector.shape[0]
        if not width or not bool(vector.float().isfinite().all()):
            got = "NaN or Inf" if width else "no number"
            raise ValueError(f"{name}[{key!r}]: got {got}; accepted: finite numbers")
        vectors[key] = vector.detach().float().cpu()
    return vectors


def _vector(file: Path) -> Tensor:
    try:
        found = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as fault:
        raise ValueError(f"embeddings: {file} is no .npy of numbers ({fault})") from None
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "fiu" or found.ndim != 1:
        got = f"{found.dtype} {found.shape}" if isinstance(found, np.ndarray) else "an archive"
        raise ValueError(f"embeddings: {file}: got {got}; accepted: one vector (m,) of numbers")
    return torch.from_numpy(found.astype(np.float32))


def _features(text: str) -> np.ndarray:
    """The 64-bit hash of each word and each run of characters, one entry for each occurrence."""
    plain = _SPACE.sub(" ", f" {text} ".translate(_LOWER))
    words = [zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in _WORD.findall(plain)]
    points = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint64)
    features = [np.array(words, np.uint64)]
    for length in _GRAMS:
        runs = np.full(max(len(points) - length + 1, 0), length, np.uint64)
        for i in range(length):  # a polynomial in the characters, modulo 2^64
            runs = runs * np.uint64(0x100000001B3) + points[i : i + len(runs)]
        features.append(runs)
    return np.concatenate(features)


def _mix(values: np.ndarray) -> np.ndarray:
    """A bijection of 64-bit numbers whose every bit depends on all (splitmix64's)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
