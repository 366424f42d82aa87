"""Versions: counts of updates, by lane and layer."""

from asyncprop.engine.versions import Versions


def test_versions_add_up_over_lanes() -> None:
    versions = Versions(lanes=2, layers=3)
    for lane, layer, age in [(0, 2, 0), (1, 2, 1), (0, 0, 4)]:
        versions.landed(lane, layer, age)
    assert versions.all() == [1, 0, 2]
    assert [versions.of(layer) for layer in range(3)] == versions.all()
    assert versions.mean_staleness() == [4.0, 0.0, 0.5]
