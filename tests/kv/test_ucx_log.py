from pathlib import Path

from hexgen2.kv.ucx_log import UcxLog, _File, parse_read_paths

LOG = """
[1.5] [vm:7:0]   | remote memory write by ucp_put*(multi) from host memory to host |
[1.5] [vm:7:0]   | 0..8191   | copy-in | cma/memory |
[1.5] [vm:7:0]   | remote memory read by ucp_get*(multi) into host memory from host |
[1.5] [vm:7:0]   +--------+-------------+---------------------+
[1.5] [vm:7:0]   | Range  | Description |       Config        |
[1.5] [vm:7:0]   | 0..16K | copy-out    | tcp/lo              |
[1.5] [vm:7:0]   | 16K+1..inf | zero-copy  | 50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1 |
[1.5] [vm:7:0]   | remote memory write by ucp_put*(multi) from host memory to host |
[1.5] [vm:7:0]   | 0..inf | zero-copy | other/one |
"""


def test_the_ways_of_reads_are_found_among_all_that_ucx_writes() -> None:
    assert parse_read_paths(LOG) == ["tcp/lo", "50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1"]


def test_nothing_is_known_before_the_first_read() -> None:
    assert parse_read_paths(LOG.split("remote memory read")[0]) == []


TABLE = """
| remote memory read by ucp_get*(multi) into host memory from host |
| 0..inf | zero-copy | {} |
"""


def test_the_kernel_alone_copies_only_if_no_context_has_read_in_another_way(tmp_path: Path) -> None:
    with (tmp_path / "log").open("w+") as file:
        shared = _File(file)
        ours, other = UcxLog(shared), UcxLog(shared)
        assert not other.is_local

        def write(path: str) -> None:
            at = file.tell()
            file.write(TABLE.format(path))
            file.flush()
            file.seek(at)

        # Whoever reads the log knows it for all, and UCX does not tell twice.
        told = []
        for reader, path in ((ours, "cma/memory"), (other, "tcp/lo"), (ours, "cma/memory")):
            write(path)
            assert reader.read_path() == path
            told.append(ours.is_local)
        assert told == [True, False, False]
