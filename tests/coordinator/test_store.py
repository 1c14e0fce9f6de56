"""What a coordinator's file holds after its process has ended."""

import sqlite3
from pathlib import Path

import pytest

from hexgen2.coordinator.state import FleetState, Snapshot
from hexgen2.coordinator.store import KEPT_PLANS, FleetStore
from hexgen2.errors import ConfigError
from hexgen2.plan import Load, ReplicaState
from tests.coordinator.harness import replica


def snapshot() -> Snapshot:
    state = FleetState(100, 5.0)
    for key in ("p1", "d1"):
        state.report(replica(key), ReplicaState.READY, Load(), 0.0)
        state.replan()
    return state.snapshot


async def test_what_was_saved_last_is_what_is_loaded(tmp_path: Path) -> None:
    path, saved = tmp_path / "new" / "state.db", snapshot()
    async with FleetStore(path) as store:
        assert await store.load() is None
        await store.save(saved)
        await store.save(saved)
    async with FleetStore(path) as store:
        assert await store.load() == saved


async def test_a_second_coordinator_is_told_that_the_file_is_taken(tmp_path: Path) -> None:
    async with FleetStore(tmp_path / "state.db"):
        with pytest.raises(ConfigError, match=r"database is locked: does another coordinator use it\? Give each"):
            async with FleetStore(tmp_path / "state.db"):
                pass


async def test_a_file_that_is_none_of_ours_is_left_alone_and_named(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.db"
    garbage.write_bytes(b"no database at all" * 100)
    newer = tmp_path / "newer.db"
    with sqlite3.connect(newer) as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    for path, told in ((garbage, "file is not a database: move it away"), (newer, "has format 99, this version knows")):
        before = path.read_bytes()
        with pytest.raises(ConfigError, match=told):
            async with FleetStore(path):
                pass
        assert path.read_bytes() == before


async def test_old_plans_are_let_go(tmp_path: Path) -> None:
    state = FleetState(1, 5.0)
    async with FleetStore(tmp_path / "state.db") as store:
        for _ in range(KEPT_PLANS + 5):
            state.replan()
            await store.save(state.snapshot)
    with sqlite3.connect(tmp_path / "state.db") as connection:
        epochs = [epoch for (epoch,) in connection.execute("SELECT epoch FROM plan ORDER BY epoch")]
    connection.close()
    assert len(epochs) == KEPT_PLANS
    assert epochs[-1] == state.plan.epoch
