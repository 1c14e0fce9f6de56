"""What the coordinator remembers over its own death: the plan, its epoch and the replicas, in one SQLite file.

One thread owns the connection; writes are in the order in which they were asked for, each on disk when it is awaited.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from google.protobuf.message import DecodeError

from hexgen2.coordinator.state import Snapshot
from hexgen2.errors import ConfigError, HexgenError
from hexgen2.plan import PlanChange, ReplicaState
from hexgen2.rpc.plan_convert import plan_from_proto, plan_to_proto
from hexgen2.v1 import types_pb2

T = TypeVar("T")

#: Plans before this one that are kept, for people who want to know what was in force when.
KEPT_PLANS = 20
#: What became of plans, and why.
KEPT_CHANGES = 1000
#: How long another process may hold the file before it counts as taken.
BUSY_S = 1.0
FORMAT = 1

_TABLES = """
CREATE TABLE IF NOT EXISTS plan (epoch INTEGER PRIMARY KEY, made_unix_s REAL NOT NULL, plan BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS placement (name TEXT PRIMARY KEY, json TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS change (number INTEGER PRIMARY KEY, unix_s REAL, epoch INTEGER, what TEXT, why TEXT);
CREATE TABLE IF NOT EXISTS replica (replica_id TEXT PRIMARY KEY, state TEXT NOT NULL, role_epoch INTEGER NOT NULL);
"""


class FleetStore:
    """See the module. An async context manager; ``path`` is made when it is not there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fleet-store")
        self._connection: sqlite3.Connection | None = None

    async def __aenter__(self) -> "FleetStore":
        """Open the file.

        Raises:
            ConfigError: it cannot be used, or another coordinator uses it.
        """
        try:
            await self._run(self._open)
        except BaseException:
            self._thread.shutdown(wait=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        try:
            await self._run(self._close)
        finally:
            self._thread.shutdown(wait=False)

    async def load(self) -> Snapshot | None:
        """What was saved last; None in a new file. Raises ConfigError when it makes no sense."""
        return await self._run(self._load)

    async def save(self, snapshot: Snapshot) -> None:
        """Keep it in place of the last one. On return it is on disk.

        Raises:
            OSError: it could not be written.
        """
        await self._run(lambda: self._save(snapshot))

    async def record(self, change: PlanChange) -> None:
        """Keep a change of plan. Raises OSError when it could not be written."""
        await self._run(lambda: self._record(change))

    async def changes(self, most: int) -> tuple[PlanChange, ...]:
        """The last of them, oldest first."""
        return await self._run(lambda: self._changes(most))

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=BUSY_S, isolation_level=None)
        except (OSError, sqlite3.Error) as error:
            raise ConfigError(f"state_file: {self.path} cannot be opened: {error}") from error
        self._connection = connection
        try:
            # Held until the end: two coordinators with one memory would contradict each other.
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            (found,) = connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, FORMAT):
                raise ConfigError(
                    f"state_file: {self.path} has format {found}, this version knows {FORMAT}: move it away; workers "
                    f"register again"
                )
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = FULL")
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
        except sqlite3.OperationalError as error:
            self._close()
            raise ConfigError(
                f"state_file: {self.path}: {error}: does another coordinator use it? Give each its own"
            ) from error
        except sqlite3.DatabaseError as error:
            self._close()
            raise ConfigError(f"state_file: {self.path}: {error}: move it away; workers register again") from error
        except ConfigError:
            self._close()
            raise

    def _close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _load(self) -> Snapshot | None:
        assert self._connection is not None
        row = self._connection.execute("SELECT plan FROM plan ORDER BY epoch DESC LIMIT 1").fetchone()
        if row is None:
            return None
        rows = self._connection.execute("SELECT replica_id, state, role_epoch FROM replica").fetchall()
        placements = dict(self._connection.execute("SELECT name, json FROM placement").fetchall())
        try:
            plan = plan_from_proto(types_pb2.Plan.FromString(row[0]))
            states = {replica_id: ReplicaState(state) for replica_id, state, _ in rows}
        except (DecodeError, HexgenError, ValueError) as error:
            raise ConfigError(
                f"state_file: {self.path} holds a plan that cannot be used ({error}): move it away; workers register "
                f"again"
            ) from error
        return Snapshot(
            plan,
            states,
            {replica_id: role_epoch for replica_id, _, role_epoch in rows},
            placements.get("applied", ""),
            placements.get("configured", ""),
        )

    def _record(self, change: PlanChange) -> None:
        assert self._connection is not None
        row = (change.unix_s, change.epoch, change.what, change.why)
        try:
            with self._connection as connection:
                connection.execute("BEGIN")
                connection.execute("INSERT INTO change (unix_s, epoch, what, why) VALUES (?, ?, ?, ?)", row)
                connection.execute("DELETE FROM change WHERE number <= last_insert_rowid() - ?", (KEPT_CHANGES,))
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error

    def _changes(self, most: int) -> tuple[PlanChange, ...]:
        assert self._connection is not None
        query = "SELECT unix_s, epoch, what, why FROM change ORDER BY number DESC LIMIT ?"
        rows = self._connection.execute(query, (most,)).fetchall()
        return tuple(PlanChange(*row) for row in reversed(rows))

    def _save(self, snapshot: Snapshot) -> None:
        connection, plan = self._connection, snapshot.plan
        assert connection is not None
        rows = [(key, state.value, snapshot.role_epochs.get(key, 0)) for key, state in snapshot.states.items()]
        try:
            with connection:
                connection.execute("BEGIN")
                connection.execute(
                    "INSERT OR IGNORE INTO plan VALUES (?, ?, ?)",
                    (plan.epoch, time.time(), plan_to_proto(plan).SerializeToString()),
                )
                connection.execute(
                    "DELETE FROM plan WHERE epoch <= (SELECT epoch FROM plan ORDER BY epoch DESC LIMIT 1 OFFSET ?)",
                    (KEPT_PLANS,),
                )
                connection.executemany(
                    "INSERT OR REPLACE INTO placement VALUES (?, ?)",
                    [("applied", snapshot.applied), ("configured", snapshot.configured)],
                )
                connection.execute("DELETE FROM replica")
                connection.executemany("INSERT INTO replica VALUES (?, ?, ?)", rows)
        except sqlite3.Error as error:
            raise OSError(f"{self.path}: {error}") from error
