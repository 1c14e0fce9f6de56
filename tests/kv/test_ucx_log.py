from hexgen2.kv.ucx_log import parse_read_path

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


def test_the_path_of_large_reads_is_found_among_all_that_ucx_writes() -> None:
    assert parse_read_path(LOG) == "50% on rc_mlx5/mlx5_0:1 and 50% on rc_mlx5/mlx5_1:1"


def test_nothing_is_known_before_the_first_read() -> None:
    assert parse_read_path(LOG.split("remote memory read")[0]) is None
