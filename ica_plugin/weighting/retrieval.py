"""Which holdout rows each train row sees."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from collections.abc import Sequence as SequenceOf
from typing import Any

import numpy as np

from ..config import ICAConfig
from ..data.holdout import Holdout
from ..data.store import Example, Sequence
from ..errors import ICAError
from ..log import get_logger

Embed = Callable[[list[Sequence]], np.ndarray]


Decode = Callable[[np.ndarray], str]


ROWS_PER_BLOCK = 4096


def retrieve(train: SequenceOf[Example], holdout: Holdout, config: ICAConfig, **settings: Any) -> list[list[int]]:
    """`retrieve_blocks`, all at once: for each of `rows`, indices into `holdout.examples`."""
    return [of_row for _, chosen in retrieve_blocks(train, holdout, config, **settings) for of_row in chosen]


def retrieve_blocks(
    train: SequenceOf[Example],
    holdout: Holdout,
    config: ICAConfig,
    *,
    rows: list[int],
    context: int | None,
    embed: Embed,
    decode: Decode,
) -> Iterator[tuple[list[int], list[list[int]]]]:
    """Choose up to k demonstrations for each of `rows`.

    The choice for a row depends on that row, the holdout and the seed alone, never on its position or on other
    train rows. Demonstrations are returned in one canonical order, the holdout rows nearest to the rest of the
    holdout first, so that rows that share demonstrations share a prefix.

    With `retrieval_groups` a row takes the demonstrations of the prototype nearest to it, one of that many holdout
    rows chosen to lie near all the others: the prototype and its own nearest.

    Args:
        train: all train rows.
        holdout: checked holdout.
        config: `retrieval`, `retrieval_groups`, `k`, `seed`.
        rows: indices into `train` of the rows to serve.
        context: the model's context in tokens; holdout rows that do not fit before the row, beside more similar ones, are
            passed over. None: unlimited.
        embed: sequences → float [n, H], the policy's hidden states pooled over their prompts.
        decode: tokens → text, for sentence-transformers.

    Yields:
        some of `rows`, in order, and for each of them indices into `holdout.examples`; empty where none fits.
    """
    shown = holdout.shown
    similarity = _similarity(config, embed, decode)
    demonstrations = [holdout.examples[i].demonstration for i in shown]
    among = similarity(demonstrations, demonstrations)
    order = _canonical_order(among, config.k)
    prototypes = _prototypes(among, config.retrieval_groups) if config.retrieval_groups else None
    length = [len(holdout.examples[i].demonstration.tokens) for i in shown]
    for start in range(0, len(rows), ROWS_PER_BLOCK):
        block = rows[start : start + ROWS_PER_BLOCK]
        scores = similarity([train[row].demonstration for row in block], demonstrations)
        if prototypes is not None:
            scores = among[prototypes[scores[:, prototypes].argmax(axis=1)]]
        chosen: list[list[int]] = []
        for row, ranked in zip(block, np.argsort(-scores, axis=1, kind="stable"), strict=True):
            room = np.inf if context is None else context - train[row].longest
            picked: list[int] = []
            for candidate in ranked:
                if len(picked) == config.k:
                    break
                if shown[candidate] in holdout.hidden_from[row]:
                    continue
                if length[candidate] > room:
                    continue
                room -= length[candidate]
                picked.append(int(candidate))
            chosen.append([shown[i] for i in sorted(picked, key=order.__getitem__)])
        yield block, chosen


def report_fewer(chosen: list[list[int]], k: int, available: int) -> None:
    """Say once how many rows see fewer than k demonstrations, and why."""
    fewer = sum(len(demos) < k for demos in chosen)
    if not fewer:
        return
    none = sum(not demos for demos in chosen)
    why = (
        f"the holdout has {available} usable row(s)"
        if available < k
        else "more do not fit the model's context, or are the row itself"
    )
    tail = f"; {none} of them see none and keep the neutral weight 1" if none else ""
    get_logger().warning("%d of %d rows see fewer than k = %d demonstrations: %s%s.", fewer, len(chosen), k, why, tail)


def _canonical_order(similarity: np.ndarray, k: int) -> list[int]:
    """Rank of each holdout row by how often it is among the k nearest of the others; ties by index."""
    similarity = similarity.copy()
    np.fill_diagonal(similarity, -np.inf)
    nearest = np.argsort(-similarity, axis=1, kind="stable")[:, : min(k, len(similarity) - 1)]
    hub = np.bincount(nearest.ravel(), minlength=len(similarity))
    ranked = np.argsort(-hub, kind="stable")
    rank = np.empty(len(ranked), int)
    rank[ranked] = np.arange(len(ranked))
    return rank.tolist()


def _prototypes(similarity: np.ndarray, count: int) -> np.ndarray:
    """Up to `count` holdout rows, chosen greedily so that every holdout row is near one (facility location)."""
    gain = similarity - similarity.min()
    covered = np.zeros(len(gain))
    chosen: list[int] = []
    for _ in range(min(count, len(gain))):
        total = np.maximum(gain, covered[:, None]).sum(axis=0)
        total[chosen] = -np.inf
        chosen.append(int(total.argmax()))
        covered = np.maximum(covered, gain[:, chosen[-1]])
    return np.array(chosen)


def _similarity(config: ICAConfig, embed: Embed, decode: Decode) -> Callable[..., np.ndarray]:
    """A function (queries, keys) → float [queries, keys]; both are lists of sequences, compared by their prompts."""
    if config.retrieval == "random":
        return lambda queries, keys: np.stack([_random_scores(query.prompt, len(keys), config.seed) for query in queries])
    if config.retrieval == "bm25":
        return lambda queries, keys: _bm25([query.prompt for query in queries], [key.prompt for key in keys])
    if config.retrieval == "policy":
        vectors = embed
    else:
        model = _sentence_transformer(config.retrieval)

        def vectors(sequences: list[Sequence]) -> np.ndarray:
            return model.encode([decode(sequence.prompt) for sequence in sequences], show_progress_bar=False)

    cache: dict[int, tuple[list[Sequence], np.ndarray]] = {}

    def similarity(queries: list[Sequence], keys: list[Sequence]) -> np.ndarray:
        if id(keys) not in cache:
            cache[id(keys)] = (keys, np.asarray(vectors(keys), dtype=np.float64))
        keyed = cache[id(keys)][1]
        asked = keyed if queries is keys else np.asarray(vectors(queries), dtype=np.float64)
        # Hidden states share a large common direction; what tells rows apart is what is left without it.
        centre = keyed.mean(axis=0) if len(keyed) > 1 else np.zeros(keyed.shape[1])
        return _unit(asked - centre) @ _unit(keyed - centre).T

    return similarity


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _random_scores(tokens: np.ndarray, n: int, seed: int) -> np.ndarray:
    digest = hashlib.blake2b(np.ascontiguousarray(tokens).tobytes(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")]).random(n)


def _bm25(queries: list[np.ndarray], keys: list[np.ndarray]) -> np.ndarray:
    # Tokens, not words: Chinese has no spaces, and what cuts text into words drops single digits and emoji.
    import bm25s

    corpus = [[str(token) for token in key.tolist()] for key in keys]
    known = {token for key in corpus for token in key}
    scores = np.zeros((len(queries), len(keys)))
    if not known:
        return scores
    index = bm25s.BM25()
    index.index(corpus, show_progress=False)
    for i, query in enumerate(queries):
        shared = [token for token in map(str, query.tolist()) if token in known]
        if shared:
            scores[i] = index.get_scores(shared)
    return scores


def _sentence_transformer(name: str) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ICAError(
            f"ica.retrieval: {name!r} is none of policy, bm25, random, so it is read as a sentence-transformers model, and "
            "that package is not installed: pip install 'ica-plugin[embeddings]'"
        ) from None
    try:
        return SentenceTransformer(name)
    except Exception as error:
        raise ICAError(
            f"ica.retrieval: {name!r} is none of policy, bm25, random, and sentence-transformers cannot load it: {error}"
        ) from error
