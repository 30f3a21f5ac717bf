"""`benchmarks/cases/overhead.py` on small bundles: its calls are what the bundle takes, and its rows are shown."""

from __future__ import annotations

from pathlib import Path

import pytest

CASES = Path(__file__).parents[2] / "benchmarks" / "cases"
with pytest.MonkeyPatch.context() as _path:
    _path.syspath_prepend(CASES)
    import overhead


@pytest.mark.parametrize("name", ["tiny", "autoencoder", "free"])
def test_calls_of_every_kind_of_bundle(name: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(name)
    found = overhead.calls(bundle, [1, 2], blocks=10)
    assert [row["what"] for row in found] == [
        f"{operation}, batch {batch}" for batch in (1, 2) for operation in ("encode", "decode")
    ]
    assert all(row["interval"][0] <= row["ratio"] <= row["interval"][1] for row in found)
    assert len(overhead.table(found).splitlines()) == 2 + len(found)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak memory is read from /proc")
def test_start_up_of_a_bundle_of_free_size(free: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overhead, "ROUNDS", 1)
    monkeypatch.delitem(overhead.PROGRAMS, "import")
    rows = overhead.start_up(free)
    assert [row["what"] for row in rows] == ["load and first result", "peak memory of load and first result"]
    assert rows[0]["interval"] == [None, None]  # one pair has none
    assert overhead.table(rows).splitlines()[2].endswith(" | – |")
