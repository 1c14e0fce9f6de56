"""What a worker tells of the KV that it received."""

from hexgen2.plan import KvReceived
from hexgen2.worker.received import Received


def test_sums_are_of_the_window_and_what_went_wrong_of_all_time() -> None:
    received = Received(window_s=60.0)
    assert received.told(0.0, 0) == KvReceived()
    received.verified(1000, 0.5, 10.0)
    received.verified(3000, 1.0, 30.0)
    received.corrupt()
    assert received.told(40.0, 64) == KvReceived(4000, 1.5, 2, 1, 64)
    assert received.told(75.0, 0) == KvReceived(3000, 1.0, 1, 1)
    assert received.told(90.0, 0) == KvReceived(num_corrupt=1)
