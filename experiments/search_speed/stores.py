"""The compared stores behind one interface: built in a folder, and opened from it by another process."""

import datetime
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

K = 10  # hits for each query
Search = Callable[[np.ndarray], np.ndarray]  # a vector [E] to the ids of its K best, best first


class NumPy:
    """All similarities by one product; opening maps the vectors without reading them."""

    efforts = (0,)

    def build(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        np.save(folder / "vectors.npy", vectors)

    def open(self, folder: pathlib.Path) -> Any:
        return np.load(folder / "vectors.npy", mmap_mode="r")

    def search(self, opened: Any, effort: int) -> Search:
        def run(query: np.ndarray) -> np.ndarray:
            similar = opened @ query
            best = np.argpartition(-similar, K)[:K]
            return best[np.argsort(-similar[best])]

        return run

    def add(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        grown = np.concatenate([np.load(folder / "vectors.npy"), vectors])
        _replace(folder / "vectors.npy", lambda path: np.save(path, grown))

    def delete(self, folder: pathlib.Path, ids: np.ndarray) -> None:
        left = np.delete(np.load(folder / "vectors.npy"), ids, axis=0)
        _replace(folder / "vectors.npy", lambda path: np.save(path, left))


class Faiss:
    """`description` is FAISS's factory string; an effort is the parameter `knob` of a search."""

    def __init__(self, description: str, knob: str, efforts: tuple[int, ...]) -> None:
        self.description, self.knob, self.efforts = description, knob, efforts

    def build(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        import faiss

        index = faiss.index_factory(vectors.shape[1], self.description, faiss.METRIC_INNER_PRODUCT)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(folder / "index"))

    def open(self, folder: pathlib.Path) -> Any:
        import faiss

        return faiss.read_index(str(folder / "index"))

    def search(self, opened: Any, effort: int) -> Search:
        import faiss

        if effort:
            faiss.ParameterSpace().set_index_parameter(opened, self.knob, effort)
        return lambda query: opened.search(query[None], K)[1][0]

    def add(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        import faiss

        index = self.open(folder)
        index.add(vectors)
        _replace(folder / "index", lambda path: faiss.write_index(index, str(path)))

    def delete(self, folder: pathlib.Path, ids: np.ndarray) -> None:
        import faiss

        index = self.open(folder)
        index.remove_ids(ids)  # HNSW raises an error
        _replace(folder / "index", lambda path: faiss.write_index(index, str(path)))


class USearch:
    """An HNSW graph; an effort is `expansion_search`."""

    def __init__(self, kind: str, efforts: tuple[int, ...]) -> None:
        self.kind, self.efforts = kind, efforts

    def build(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        from usearch.index import Index

        index = Index(ndim=vectors.shape[1], metric="cos", dtype=self.kind)
        index.add(np.arange(len(vectors)), vectors)
        index.save(str(folder / "index"))

    def open(self, folder: pathlib.Path) -> Any:
        from usearch.index import Index

        return Index.restore(str(folder / "index"), view=True)

    def search(self, opened: Any, effort: int) -> Search:
        opened.expansion_search = effort
        return lambda query: opened.search(query, K).keys

    def add(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        self._change(folder, lambda index: index.add(np.arange(len(index), len(index) + len(vectors)), vectors))

    def delete(self, folder: pathlib.Path, ids: np.ndarray) -> None:
        self._change(folder, lambda index: index.remove(ids))

    def _change(self, folder: pathlib.Path, change: Callable[[Any], object]) -> None:
        from usearch.index import Index

        index = Index.restore(str(folder / "index"), view=False)
        change(index)
        _replace(folder / "index", lambda path: index.save(str(path)))


class LanceDB:
    """A table of ids, files, times and vectors, with a vector index or (`kind` empty) without; efforts are probes."""

    def __init__(self, kind: str, efforts: tuple[int, ...], refine: int = 0, **options: Any) -> None:
        self.kind, self.efforts, self.refine, self.options = kind, efforts, refine, options

    def build(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        import lancedb

        table = lancedb.connect(folder).create_table("clips", _rows(0, vectors))
        if self.kind:
            table.create_index(metric="dot", index_type=self.kind, **self.options)

    def open(self, folder: pathlib.Path) -> Any:
        import lancedb

        return lancedb.connect(folder).open_table("clips")

    def search(self, opened: Any, effort: int) -> Search:
        def run(query: np.ndarray) -> np.ndarray:
            request = opened.search(query).distance_type("dot").limit(K).select(["id", "file", "start", "_distance"])
            if self.kind:
                request = request.nprobes(effort)
            if self.refine:
                request = request.refine_factor(self.refine)
            return request.to_arrow()["id"].to_numpy()

        return run

    def add(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        table = self.open(folder)
        table.add(_rows(table.count_rows(), vectors))

    def delete(self, folder: pathlib.Path, ids: np.ndarray) -> None:
        self.open(folder).delete(f"id IN ({', '.join(map(str, ids))})")

    def tidy(self, folder: pathlib.Path) -> None:
        """Joins small files and indexes added rows."""
        self.open(folder).optimize(cleanup_older_than=datetime.timedelta(hours=1))


class Qdrant:
    """Qdrant's client without a server: exact search in NumPy, with the points in SQLite.

    It warns above 20,000 points, and takes minutes to store more: therefore 20,000 are measured.
    """

    efforts = (0,)
    most = 20_000

    def build(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        from qdrant_client import models

        client = self.open(folder)
        size = models.VectorParams(size=vectors.shape[1], distance=models.Distance.DOT)
        client.create_collection("clips", vectors_config=size)
        self._add(client, 0, vectors)
        client.close()

    def open(self, folder: pathlib.Path) -> Any:
        from qdrant_client import QdrantClient

        return QdrantClient(path=str(folder))

    def search(self, opened: Any, effort: int) -> Search:
        return lambda query: np.array([p.id for p in opened.query_points("clips", query=query, limit=K).points])

    def add(self, folder: pathlib.Path, vectors: np.ndarray) -> None:
        client = self.open(folder)
        self._add(client, client.count("clips").count, vectors)
        client.close()

    def delete(self, folder: pathlib.Path, ids: np.ndarray) -> None:
        client = self.open(folder)
        client.delete("clips", points_selector=ids.tolist())
        client.close()

    def _add(self, client: Any, first: int, vectors: np.ndarray) -> None:
        client.upload_collection("clips", vectors, ids=range(first, first + len(vectors)))


STORES: dict[str, Any] = {
    "NumPy, exact": NumPy(),
    "FAISS, exact (Flat)": Faiss("Flat", "", (0,)),
    "FAISS IVF1024,SQ8": Faiss("IVF1024,SQ8", "nprobe", (8, 16, 32, 64, 128, 256)),
    "FAISS HNSW32": Faiss("HNSW32", "efSearch", (32, 64, 128, 256, 512, 1024)),
    "usearch, float16": USearch("f16", (64, 128, 256, 512, 1024, 2048)),
    "usearch, int8": USearch("i8", (64, 128, 256, 512, 1024, 2048)),
    "LanceDB, exact": LanceDB("", (0,)),
    "LanceDB IVF_FLAT": LanceDB("IVF_FLAT", (2, 4, 8, 16, 32, 64)),
    "LanceDB IVF_FLAT, 125 partitions": LanceDB("IVF_FLAT", (8, 16, 32, 64), num_partitions=125),
    "LanceDB IVF_SQ": LanceDB("IVF_SQ", (2, 4, 8, 16, 32, 64), 4),
    "LanceDB IVF_PQ": LanceDB("IVF_PQ", (8, 16, 32, 64, 128), 50),
    "LanceDB IVF_HNSW_SQ": LanceDB("IVF_HNSW_SQ", (1, 2, 4, 8, 16), 10),
    "Qdrant, local (20,000)": Qdrant(),
}


def _rows(first: int, vectors: np.ndarray) -> Any:
    import pyarrow as pa

    ids = np.arange(first, first + len(vectors))
    flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
    columns = {
        "id": pa.array(ids),
        "file": pa.array([f"videos/{number // 10:06d}.mp4" for number in ids]),
        "start": pa.array((ids % 10 * 10).astype(np.float32)),
        "vector": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
    }
    return pa.table(columns)


def _replace(path: pathlib.Path, write: Callable[[pathlib.Path], object]) -> None:
    """Replaces a file in one step, as a store in a single file must do."""
    temporary = path.with_name(f"new-{path.name}")
    write(temporary)
    os.replace(temporary, path)
