"""The exact passes on all models of the onnx wheel: `tests.test_exact_corpus`, nothing left out.

python -m tests.benchmarks.corpus KIND prints the counts of one kind of models as JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator

from tests.benchmarks import job
from tests.benchmarks.cases import Setting
from tests.benchmarks.table import Goal, goals, table

_KINDS = ("node", "frozen", "file", "light")
_SHOWN = 5


def tables(setting: Setting) -> Iterator[str]:
    """Counts by kind of models, and what failed."""
    failures: list[str] = []
    os.environ["ONNXCOMPRESS_CORPUS"] = "" if setting.quick else "all"

    def rows() -> Iterator[list[str]]:
        for kind in _KINDS:
            done = job.run([sys.executable, "-m", "tests.benchmarks.corpus", kind])
            if done.failure:
                failures.append(f"{kind}: {done.failure}")
                yield [kind, "fails", "", "", ""]
                continue
            found = json.loads(done.output)
            failures.extend(found["failures"])
            counts = (str(found[key]) for key in ("models", "ran", "changed"))
            yield [kind, *counts, str(len(found["failures"]))]

    yield from table(("models of the onnx wheel", "tried", "ran", "changed", "failed"), rows())
    yield from goals([Goal(what="failures of exact passes", figure=len(failures), bound=0)])
    for failure in failures[:_SHOWN]:
        yield f"- {failure}"


def _count(kind: str) -> None:
    from tests import test_exact_corpus as corpus

    found = {"models": 0, "ran": 0, "changed": 0}
    failures: list[str] = []
    for case in getattr(corpus, f"{kind}_cases")():
        found["models"] += 1
        try:
            changed, ran = corpus._check(case)
        except Exception as error:  # every model is tried, whatever becomes of one
            failures.append(f"{case.name}: {type(error).__name__}: {str(error)[:150]}")
        else:
            found["ran"] += ran
            found["changed"] += changed
    print(json.dumps({**found, "failures": failures}))


if __name__ == "__main__":
    _count(sys.argv[1])
