"""Time every mechanism beside its peer and write book/reference/_data/benchmarks.json.

python -m benchmarks             all cases; takes some minutes, on an otherwise idle machine
python -m benchmarks decoding    these cases alone; the others keep the rows they have
python -m benchmarks --small     each case once, at a size that shows nothing but that it runs
"""

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path

RESULTS = Path(__file__).resolve().parents[1] / "book" / "reference" / "_data" / "benchmarks.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--small", action="store_true", help="try every case out and write nothing")
    options = parser.parse_args(argv)
    for variable in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[variable] = "1"  # before the libraries that read them are imported

    import torch
    from tqdm import tqdm

    from benchmarks import cases, retrieval
    from benchmarks.harness import Comparison, Count, compare, count, grow

    torch.set_num_threads(1)
    known = {case.__name__: case for case in (*cases.ALL, *retrieval.ALL)}
    if unknown := sorted(set(options.cases) - known.keys()):
        parser.error(f"no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    rows: list[dict] = []
    with tqdm(options.cases or known, unit="case") as bar:
        for name in bar:
            for case in known[name](options.small):
                bar.set_postfix_str(case.name)
                row = {"case": name, "name": case.name, "work": case.work}
                if isinstance(case, Comparison):
                    row |= {"peer": case.peer, "version": _version(case.peer)}
                    row |= compare(case, *((5, 0.0) if options.small else ()))
                elif isinstance(case, Count):
                    row |= {"peer": case.peer, "version": _version(case.peer)} | count(case)
                else:
                    row |= grow(case, *((1, 0.0) if options.small else ()))
                rows.append(row | {"at_most": case.at_most})
    if not options.small:
        _write(rows, list(known))
    missed = [
        row for row in rows if row["at_most"] and row.get("ratio", row.get("exponent")) > row["at_most"]
    ]
    for row in rows:
        measured = (
            f"{row['ratio']:.2f} ({row['low']:.2f} to {row['high']:.2f})"
            if "ratio" in row
            else row["exponent"]
        )
        print(f"{row['name']:<28} {'ratio' if 'ratio' in row else 'exponent':<9}{measured}")
    if missed and not options.small:
        print(f"Slower than they must be: {', '.join(row['name'] for row in missed)}.")
        return 1
    return 0


def _write(rows: list[dict], order: list[str]) -> None:
    """Put the rows in place of those of the same cases; the file is always the old or the new one."""
    timed = {row["case"] for row in rows}
    kept = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else []
    rows = [row for row in kept if row["case"] not in timed and row["case"] in order] + rows
    rows.sort(key=lambda row: order.index(row["case"]))
    part = RESULTS.with_name(RESULTS.name + ".part")
    part.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(part, RESULTS)


def _version(peer: str) -> str:
    """The version of the library that a peer comes from; empty where the peer is this package itself."""
    try:
        return importlib.metadata.version(peer.split(".")[0]).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    sys.exit(main())
