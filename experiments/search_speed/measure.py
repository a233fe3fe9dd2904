"""Which store finds the nearest of 200,000 embeddings fast enough, and what does it cost?

    python -m venv stores && stores/bin/pip install -r experiments/search_speed/requirements.txt jaxtyping
    stores/bin/python -m experiments.search_speed.measure

Each store is built by one process and queried by another, so that their memory is measured separately. `--only`
measures some of the stores.
"""

import argparse
import importlib
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np

from experiments.search_speed.embeddings import WINDOWS, Made, make, statistics
from experiments.search_speed.stores import STORES, K
from experiments.timing import commit

RECALL = 0.95
KINDS = ("texts", "windows")
WARM_UP = 20  # queries before the counted ones
PACKAGES = ("numpy", "lancedb", "faiss-cpu", "usearch", "qdrant-client")


def build(name: str, vectors: np.ndarray, folder: pathlib.Path) -> dict[str, Any]:
    """Builds a store, in a process of its own."""
    started = time.perf_counter()
    STORES[name].build(folder, vectors)
    return {
        "build_s": time.perf_counter() - started,
        "disk_MB": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6,
        "build_peak_MB": _peak() - vectors.nbytes / 1e6,
    }


def ask(name: str, queries: dict[str, np.ndarray], truth: dict[str, np.ndarray], folder: pathlib.Path) -> dict:
    """Opens a store and queries it with increasing effort until recall suffices, in a process of its own."""
    store, before = STORES[name], _peak()
    started = time.perf_counter()
    opened = store.open(folder)
    store.search(opened, store.efforts[-1])(queries["texts"][0])
    found: dict[str, Any] = {"open_and_first_query_s": time.perf_counter() - started, "tried": []}
    for effort in store.efforts:
        search = store.search(opened, effort)
        each = {kind: _timed(search, queries[kind], truth[kind]) for kind in queries}
        found["tried"].append({"effort": effort, **each})
        print(f"{name}: {found['tried'][-1]}", file=sys.stderr, flush=True)
        if min(each[kind]["recall"] for kind in each) >= RECALL:
            break
    return {**found, "memory_MB": _peak() - before}


def change(name: str, vectors: np.ndarray, folder: pathlib.Path) -> dict[str, Any]:
    """Seconds to add 1,000 vectors and to delete 100, on the disk; None if the store cannot."""
    store, found = STORES[name], {}
    _import_all()  # not part of the measurement
    steps = {
        "add_s": lambda: store.add(folder, vectors[:1000]),
        "delete_s": lambda: store.delete(folder, np.arange(100)),
    }
    for step, run in steps.items():
        started = time.perf_counter()
        try:
            run()
            found[step] = time.perf_counter() - started
        except RuntimeError:  # FAISS raises it if an index lacks an operation
            found[step] = None
    if hasattr(store, "tidy"):
        started = time.perf_counter()
        store.tidy(folder)
        found["tidy_s"] = time.perf_counter() - started
    return found


def _import_all() -> None:
    for module in ("faiss", "lancedb", "pyarrow", "qdrant_client", "usearch.index"):
        importlib.import_module(module)


def _timed(search: Any, queries: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    for query in queries[:WARM_UP]:
        search(query)
    milliseconds, hits = [], 0
    for query, best in zip(queries[WARM_UP:], truth[WARM_UP:], strict=True):
        started = time.perf_counter()
        found = search(query)
        milliseconds.append(1000 * (time.perf_counter() - started))
        hits += len(set(found.tolist()) & set(best.tolist()))
    p50, p95 = np.percentile(milliseconds, [50, 95])
    return {"p50_ms": float(p50), "p95_ms": float(p95), "recall": hits / (K * len(milliseconds))}


def _peak() -> float:
    """The peak memory of this process, in MB; `getrusage` would include its parent's."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1e3


def _part(given: argparse.Namespace) -> None:
    """Runs one step for one store, in a process of its own, and prints its figures as JSON."""
    data = pathlib.Path(given.data)
    if given.step == "ask":
        loaded = [{kind: np.load(data / f"{name}{kind}.npy") for kind in KINDS} for name in ("", "best_")]
        figures = ask(given.store, *loaded, data / "store")
    else:
        step = {"build": build, "change": change}[given.step]
        figures = step(given.store, np.load(data / "clips.npy"), data / "store")
    print(json.dumps(figures))


def _run(store: str, made: Made) -> dict[str, Any]:
    """Runs all steps of a store, each in a process of its own."""
    count = getattr(STORES[store], "most", len(made.clips))
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = pathlib.Path(folder)
        (data / "store").mkdir()
        np.save(data / "clips.npy", made.clips[:count])
        for kind in KINDS:
            vectors = getattr(made, kind)
            np.save(data / f"{kind}.npy", vectors)
            np.save(data / f"best_{kind}.npy", np.argsort(-(vectors @ made.clips[:count].T), axis=1)[:, :K])
        for step in ("build", "ask", "change"):
            command = [sys.executable, "-m", "experiments.search_speed.measure", f"--step={step}"]
            done = subprocess.run([*command, f"--store={store}", f"--data={data}"], stdout=subprocess.PIPE, check=True)
            figures |= json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Measures and writes `results.json` beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200_000, help=f"number of embeddings, a multiple of {WINDOWS}")
    parser.add_argument("--queries", type=int, default=200, help="number of queries of each kind")
    parser.add_argument("--only", default="", help="only stores whose name contains this")
    parser.add_argument("--out", default=str(pathlib.Path(__file__).with_name("results.json")))
    for hidden in ("step", "store", "data"):
        parser.add_argument(f"--{hidden}", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.step:
        _part(given)
        return
    made = make(given.count, given.queries + WARM_UP)
    shape = statistics(made)
    print(json.dumps(shape, indent=2), file=sys.stderr, flush=True)
    stores = {name: _run(name, made) for name in STORES if given.only in name}
    versions = {name: importlib.metadata.version(name) for name in PACKAGES}
    recorded = {
        "count": given.count,
        "queries": given.queries,
        "shape": shape,
        "stores": stores,
        "commit": commit(),
        "python": platform.python_version(),
        "machine": "2 shared cores of an x86-64 server",
        "versions": versions,
    }
    pathlib.Path(given.out).write_text(json.dumps(recorded, indent=2) + "\n")
    print(_table(stores))


def _table(stores: dict[str, dict[str, Any]]) -> str:
    """The figures as a Markdown table, with the last effort: the lowest one with enough recall."""
    lines = [
        "| store | p50 / p95, texts (ms) | recall@10 | p50 / p95, clips (ms) | recall@10 | "
        "import, open and first query (s) | build (s) | disk (MB) | memory (MB) | add 1,000 / delete 100 (s) |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, figures in stores.items():
        last = figures["tried"][-1]
        cells = [f"{name}, effort {last['effort']}" if last["effort"] else name]
        for kind in ("texts", "windows"):
            each = last[kind]
            cells += [f"{each['p50_ms']:.1f} / {each['p95_ms']:.1f}", f"{each['recall']:.3f}"]
        cells += [f"{figures['open_and_first_query_s']:.2f}", f"{figures['build_s']:.0f}", f"{figures['disk_MB']:.0f}"]
        cells += [f"{figures['memory_MB']:.0f}"]
        cells += [" / ".join("-" if figures[k] is None else f"{figures[k]:.2f}" for k in ("add_s", "delete_s"))]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
