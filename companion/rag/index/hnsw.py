"""Hierarchical navigable small world: a graph to walk to near neighbours in (Malkov & Yashunin, 2018).

Every vector is a node, linked to some that are near it in all directions. A search walks from an entry point
to whichever neighbour is nearest to the query, keeping the `ef` best nodes seen, until none of them has a
neighbour left that is worth looking at. A node also stands on layer l with probability M^−l: the upper layers
hold few nodes with long links, and bring the walk to the right region in a few steps.

The paper inserts one node at a time. Here a batch of nodes walks the graph in lockstep, each finding its
candidates there and among the others of the batch, so that a step is one matrix product for all of them.
"""

import math

import numpy as np

from companion._checks import check_positive
from companion.rag.index._base import VectorIndex, best, check_shape

BATCH = 512  # nodes inserted together, at most as many as the graph holds already
EXPANDED = 4  # nodes of a walk whose neighbours are looked at together
VISITED = 2**26  # bytes of marks for nodes that walks have seen
GATHERED = 2**24  # numbers of candidates' vectors held at a time
TOP = 24  # layers above the lowest at most


class HNSWIndex(VectorIndex):
    """A navigable graph of vectors: few comparisons a query, and not every neighbour found.

    Args:
        dimension, metric: as in `VectorIndex`.
        neighbours: M, links that a new node chooses on each layer; it may come to have 2 M on the lowest.
        ef_construction: candidates among which it chooses, at least M.
        ef_search: nodes that a search keeps, at least k. More find more, and cost more; may be set later.
        seed: draws the nodes' layers.

    A deleted vector stays a stepping stone, and is not found; the graph is built anew once more than half are
    deleted. Where a filter leaves less than a tenth of the vectors, these are compared one by one.
    """

    parameters = ("neighbours", "ef_construction", "ef_search", "seed")

    def __init__(
        self,
        dimension: int,
        *,
        metric: str = "ip",
        neighbours: int = 16,
        ef_construction: int = 100,
        ef_search: int = 64,
        seed: int = 0,
    ):
        super().__init__(dimension, metric=metric)
        for name, value in (("neighbours", neighbours), ("ef_search", ef_search)):
            check_positive(name, value)
        if neighbours < 2:
            raise ValueError(f"neighbours must be at least 2, got {neighbours}")
        if ef_construction < neighbours:
            raise ValueError(
                f"ef_construction must be at least neighbours {neighbours}, got {ef_construction}"
            )
        self.neighbours, self.ef_construction = neighbours, ef_construction
        self.ef_search, self.seed = ef_search, seed
        self._clear()

    def __len__(self) -> int:
        return int(np.count_nonzero(self._ids >= 0))

    def _clear(self) -> None:
        self._stored = np.empty((0, self.dimension), np.float32)
        self._biases = np.empty(0, np.float32)
        self._levels = np.empty(0, np.int64)
        self._links: list[
            np.ndarray
        ] = []  # of layer l: (nodes on it, M or 2 M) rows of neighbours, −1 padded
        self._slots: list[
            np.ndarray
        ] = []  # of layer l: (N,) the place of a node in `_links[l]`, −1: not there
        self._linked = 0  # nodes that the graph holds; the others wait for their batch
        self._entry = -1  # a node of the highest layer

    # ---------------------------------------------------------------------------------------------- walking

    def _walk(self, queries: np.ndarray, entries: np.ndarray, layer: int, ef: int):
        """The ef best nodes that walks on a layer find, best first: rows and scores, both (q, ef).

        Args:
            queries: (q, d).
            entries: (q, e) rows to start from, −1 where there are fewer.
        """
        size = max(1, VISITED // len(self._ids))
        parts = [
            self._walk_together(queries[start : start + size], entries[start : start + size], layer, ef)
            for start in range(0, len(queries), size)
        ]
        return tuple(np.concatenate(part) for part in zip(*parts, strict=True))

    def _walk_together(self, queries: np.ndarray, entries: np.ndarray, layer: int, ef: int):
        links, slots = self._links[layer], self._slots[layer]
        seen = np.zeros((len(queries), len(self._ids)), bool)
        walking = np.arange(len(queries))
        scores = self._fresh_scores(queries, walking, entries, seen)
        rows, expanded = entries, np.zeros(entries.shape, bool)
        kept_rows = np.full((len(queries), ef), -1)
        kept_scores = np.full((len(queries), ef), -np.inf, np.float32)
        while True:
            if rows.shape[1] > ef:
                keep = np.argpartition(-scores, ef - 1, axis=1)[:, :ef]
                rows, scores, expanded = (np.take_along_axis(x, keep, 1) for x in (rows, scores, expanded))
            open_scores = np.where(expanded, -np.inf, scores)
            ended = ~np.isfinite(open_scores).any(1)
            if ended.any():
                width = rows.shape[1]
                kept_rows[walking[ended], :width] = rows[ended]
                kept_scores[walking[ended], :width] = scores[ended]
                rows, scores, expanded, open_scores, walking = (
                    x[~ended] for x in (rows, scores, expanded, open_scores, walking)
                )
                if not len(walking):
                    break
            width = min(EXPANDED if ef > EXPANDED else 1, rows.shape[1])
            chosen = np.argpartition(-open_scores, width - 1, axis=1)[:, :width]
            alive = np.isfinite(np.take_along_axis(open_scores, chosen, 1))
            nodes = np.where(alive, np.take_along_axis(rows, chosen, 1), -1)
            np.put_along_axis(expanded, chosen, True, 1)
            around = np.where(alive[..., None], links[slots[nodes]], -1).reshape(len(walking), -1)
            around_scores = self._fresh_scores(queries, walking, around, seen)
            around = np.where(np.isfinite(around_scores), around, -1)
            rows = np.concatenate((rows, around), 1)
            scores = np.concatenate((scores, around_scores), 1)
            expanded = np.concatenate((expanded, np.zeros(around.shape, bool)), 1)
        order = np.argsort(-kept_scores, axis=1, kind="stable")
        return np.take_along_axis(kept_rows, order, 1), np.take_along_axis(kept_scores, order, 1)

    def _fresh_scores(self, queries, walking, rows, seen) -> np.ndarray:
        """Scores of the rows (w, r) that a walk has not seen yet, which are marked; −∞ for the others."""
        fresh = (rows >= 0) & ~seen[walking[:, None], rows]
        if rows.shape[1] > 1:  # a row may stand there twice, as a neighbour of two nodes
            order = np.argsort(rows, axis=1, kind="stable")
            ordered = np.take_along_axis(rows, order, 1)
            again = np.zeros(rows.shape, bool)
            np.put_along_axis(again, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], 1)
            fresh &= ~again
        walk, place = fresh.nonzero()
        found = rows[walk, place]
        seen[walking[walk], found] = True
        self.distance_count += len(found)
        scores = np.full(rows.shape, -np.inf, np.float32)
        if len(walking) == 1:
            scores[walk, place] = self._stored[found] @ queries[walking[0]] - self._biases[found]
        else:
            size = max(1, GATHERED // self.dimension)
            for start in range(0, len(found), size):
                part = slice(start, start + size)
                products = np.einsum(
                    "pd,pd->p", self._stored[found[part]], queries[walking[walk[part]]], optimize=False
                )
                scores[walk[part], place[part]] = products - self._biases[found[part]]
        return scores

    def _descend(self, queries: np.ndarray, layer: int) -> np.ndarray:
        """Where greedy walks from the entry point arrive on the layer above `layer`: rows (q, 1)."""
        rows = np.full((len(queries), 1), self._entry)
        for upper in range(len(self._links) - 1, layer, -1):
            rows = self._walk(queries, rows, upper, 1)[0]
        return rows

    def _search(self, queries, scores, rows, mask) -> None:
        allowed = self._ids >= 0 if mask is None else mask
        count, k = int(np.count_nonzero(allowed)), scores.shape[1]
        if count <= max(k, len(allowed) // 10):
            candidates = np.flatnonzero(allowed)
            self.distance_count += len(queries) * count
            found = queries @ self._stored[candidates].T - self._biases[candidates]
            found_rows = np.broadcast_to(candidates, found.shape)
        else:
            ef = min(math.ceil(max(self.ef_search, k) * len(allowed) / count), len(allowed))
            found_rows, found = self._walk(queries, self._descend(queries, 0), 0, ef)
            found = np.where((found_rows >= 0) & allowed[found_rows], found, -np.inf)
        for i, row in enumerate(found):
            chosen = best(row, k)
            chosen = chosen[np.isfinite(row[chosen])]
            scores[i, : len(chosen)], rows[i, : len(chosen)] = row[chosen], found_rows[i, chosen]

    # --------------------------------------------------------------------------------------------- building

    def _add(self, vectors: np.ndarray, ids: np.ndarray) -> None:
        count = self.distance_count  # which counts searches alone
        random = np.random.default_rng([self.seed, len(self._ids)])
        heights = -np.log1p(-random.random(len(vectors))) / math.log(self.neighbours)
        levels = np.minimum(heights.astype(np.int64), TOP)
        self._ids = np.concatenate((self._ids, ids))
        self._stored = np.concatenate((self._stored, vectors))
        self._biases = np.concatenate((self._biases, self._bias(vectors)))
        first, self._levels = len(self._levels), np.concatenate((self._levels, levels))
        for layer in range(max(len(self._links) - 1, int(levels.max(initial=0))) + 1):
            if layer == len(self._links):
                self._links.append(np.empty((0, self._cap(layer)), np.int32))
                self._slots.append(np.full(first, -1))
            new = levels >= layer
            old = len(self._links[layer])
            slots = np.where(new, old + np.cumsum(new) - 1, -1)
            empty = np.full((np.count_nonzero(new), self._cap(layer)), -1, np.int32)
            self._links[layer] = np.concatenate((self._links[layer], empty))
            self._slots[layer] = np.concatenate((self._slots[layer], slots))
        while self._linked < len(self._ids):
            size = min(BATCH, max(16, self._linked), len(self._ids) - self._linked)
            self._insert(np.arange(self._linked, self._linked + size))
            self._linked += size
        self.distance_count = count

    def _cap(self, layer: int) -> int:
        return self.neighbours if layer else 2 * self.neighbours

    def _insert(self, rows: np.ndarray) -> None:
        """Link a batch of nodes into the graph."""
        queries, levels = self._stored[rows], self._levels[rows]
        top = -1 if self._entry < 0 else int(self._levels[self._entry])
        among = queries @ queries.T - self._biases[rows]
        entries = np.full((len(rows), 1), self._entry)
        for layer in range(max(top, int(levels.max())), -1, -1):
            here = levels >= layer
            found = np.full((len(rows), 1), -1), np.full((len(rows), 1), -np.inf, np.float32)
            if layer <= top:
                below, joining = (
                    self._walk(queries[group], entries[group], layer, ef)
                    if group.any()
                    else (np.empty((0, ef), int), np.empty((0, ef), np.float32))
                    for group, ef in ((~here, 1), (here, self.ef_construction))
                )
                found = tuple(np.full((len(rows), self.ef_construction), x) for x in (-1, -np.inf))
                for part, one, many in zip(found, below, joining, strict=True):
                    part[~here, :1], part[here] = one, many
                entries = found[0]
            if here.any():
                others = np.where(here & ~np.eye(len(rows), dtype=bool)[here], among[here], -np.inf)
                batch_rows = np.where(np.isfinite(others), rows, -1)
                candidates = np.concatenate((found[0][here], batch_rows), 1)
                scores = np.concatenate((found[1][here], others), 1).astype(np.float32)
                self._link(rows[here], candidates, scores, layer)
        highest = int(levels.argmax())
        if levels[highest] > top:
            self._entry = int(rows[highest])

    def _link(self, nodes: np.ndarray, candidates: np.ndarray, scores: np.ndarray, layer: int) -> None:
        """Choose neighbours for new nodes, and offer the nodes to them in return."""
        links, slots, cap = self._links[layer], self._slots[layer], self._cap(layer)
        chosen = self._diverse(nodes, candidates, scores, self.neighbours)
        links[slots[nodes], : chosen.shape[1]] = chosen
        source, place = (chosen >= 0).nonzero()
        target, source = chosen[source, place], nodes[source]
        is_new = ~(links[slots[target]] == source[:, None]).any(1)
        target, source = target[is_new], source[is_new]
        if not len(target):
            return
        order = np.argsort(target, kind="stable")
        target, source = target[order], source[order]
        hubs, start, offers = np.unique(target, return_index=True, return_counts=True)
        offered = np.full((len(hubs), offers.max()), -1)
        offered[
            np.repeat(np.arange(len(hubs)), offers), np.arange(len(target)) - np.repeat(start, offers)
        ] = source
        everyone = np.concatenate((links[slots[hubs]], offered), 1)
        crowded = (everyone >= 0).sum(1) > cap
        packed = np.take_along_axis(everyone, np.argsort(everyone < 0, axis=1, kind="stable"), 1)
        links[slots[hubs[~crowded]]] = packed[~crowded][:, :cap]
        size = max(1, GATHERED // (everyone.shape[1] * self.dimension))
        for first in range(0, np.count_nonzero(crowded), size):
            part = np.flatnonzero(crowded)[first : first + size]
            around = packed[part]
            vectors = self._stored[around]  # (h, w, d); a padded place takes the last row, and −∞
            near = (vectors @ self._stored[hubs[part], :, None])[..., 0] - self._biases[around]
            near = np.where(around >= 0, near, -np.inf)
            links[slots[hubs[part]]] = -1
            kept = self._diverse(hubs[part], around, near, cap)
            links[slots[hubs[part]], : kept.shape[1]] = kept

    def _diverse(
        self, nodes: np.ndarray, candidates: np.ndarray, scores: np.ndarray, count: int
    ) -> np.ndarray:
        """Up to `count` neighbours of each node, in different directions: (n, ≤ count) rows, −1 padded.

        The nearest candidate is taken, then each further one that is nearer to the node than to all taken
        before (the paper's algorithm 4): of a cluster one is enough.
        """
        width = min(max(self.ef_construction, count), candidates.shape[1])
        keep = np.argsort(-scores, axis=1, kind="stable")[:, :width]
        candidates, scores = (np.take_along_axis(x, keep, 1) for x in (candidates, scores))
        result = np.full((len(nodes), count), -1)
        size = max(1, GATHERED // (width * self.dimension))
        for start in range(0, len(nodes), size):
            part = slice(start, start + size)
            rows = candidates[part]
            bias, vectors = self._biases[rows], self._stored[rows]
            between = vectors @ vectors.transpose(0, 2, 1) - bias[:, :, None] - bias[:, None]
            to_node = scores[part] - self._biases[nodes[part], None]
            taken = np.zeros(rows.shape, bool)
            left = np.full(len(rows), count)
            for j in range(width):
                nearer = (taken & (between[:, j] > to_node[:, j, None])).any(1)
                taken[:, j] = np.isfinite(to_node[:, j]) & ~nearer & (left > 0)
                left -= taken[:, j]
            packed = np.argsort(~taken, axis=1, kind="stable")[:, :count]
            chosen = np.where(np.take_along_axis(taken, packed, 1), np.take_along_axis(rows, packed, 1), -1)
            result[part, : chosen.shape[1]] = chosen
        return result

    def _delete(self, gone: np.ndarray) -> None:
        self._ids = np.where(gone, -1, self._ids)
        if 2 * len(self) < len(self._ids):
            alive = self._ids >= 0
            vectors, ids = self._stored[alive], self._ids[alive]
            self._ids = np.empty(0, np.int64)
            self._clear()
            if len(ids):
                self._add(vectors, ids)

    # ------------------------------------------------------------------------------------------------ files

    def _state(self) -> dict[str, np.ndarray]:
        links = {f"links.{layer}": links for layer, links in enumerate(self._links)}
        return {"vectors": self._stored, "levels": self._levels, "entry": np.array([self._entry]), **links}

    def _restore(self, state: dict[str, np.ndarray]) -> None:
        n = len(self._ids)
        self._stored = check_shape("vectors", state["vectors"], (n, self.dimension), np.float32)
        self._biases = self._bias(self._stored)
        self._levels = check_shape("levels", state["levels"], (n,), np.int64)
        (self._entry,) = check_shape("entry", state["entry"], (1,), np.int64).tolist()
        levels = self._levels
        if n and not (levels.min() >= 0 and levels.max() <= TOP and 0 <= self._entry < n):
            raise ValueError(f"levels must lie in 0 … {TOP}, and the entry point in 0 … {n - 1}")
        self._links, self._slots, self._linked = [], [], n
        for layer in range(int(self._levels.max(initial=-1)) + 1):
            on_layer = self._levels >= layer
            shape = (int(np.count_nonzero(on_layer)), self._cap(layer))
            links = check_shape(f"links.{layer}", state[f"links.{layer}"], shape, np.int32)
            if links.size and not -1 <= links.min() <= links.max() < n:
                raise ValueError(f"links.{layer} must lie in −1 … {n - 1}")
            if not on_layer[links[links >= 0]].all():
                raise ValueError(f"links.{layer} must lead to nodes of the layer")
            self._links.append(links)
            self._slots.append(np.where(on_layer, np.cumsum(on_layer) - 1, -1))
        if n and self._levels[self._entry] != len(self._links) - 1:
            raise ValueError("the entry point must stand on the highest layer")
