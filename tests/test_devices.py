"""A plan's devices against a machine's."""

import pytest

from hexgen2.devices import Machine, Share, cpu_share, is_gpu, shares
from hexgen2.errors import ConfigError
from tests.placements import placement, planned_replica, stage


@pytest.mark.parametrize(
    ("planned", "driver", "same"),
    [
        ("A100-SXM", "NVIDIA A100-SXM4-80GB", True),
        ("A100-PCIe", "NVIDIA A100-SXM4-80GB", False),
        ("A100-PCIe", "NVIDIA A100 80GB PCIe", True),
        ("H200-SXM", "NVIDIA H200", True),
        ("H100-SXM", "NVIDIA H200", False),
        ("L40", "NVIDIA L40S", False),
        ("L40S", "NVIDIA L40S", True),
        ("RTX-4090", "NVIDIA GeForce RTX 4090", True),
        ("A6000", "NVIDIA RTX A6000", True),
    ],
)
def test_drivers_names_are_matched_by_their_words(planned: str, driver: str, same: bool) -> None:
    assert is_gpu(planned, driver) is same


def test_cpu_devices_say_their_share_of_a_core() -> None:
    devices = ("cpu", "cpu-0.25", "cpu-2", "cpu-0", "A100-SXM")
    assert [cpu_share(device) for device in devices] == [1.0, 0.25, 2.0, None, None]


def test_each_replica_gets_gpus_of_its_own_kind() -> None:
    plan = placement(
        planned_replica("p", "prefill", stage("A100-SXM", 2)),
        planned_replica("d", "decode", stage("L40", 1, 0, 20), stage("A100-SXM", 1, 20, 20)),
    )
    machine = Machine(("NVIDIA L40", *["NVIDIA A100-SXM4-80GB"] * 3), 8)
    assert shares(plan, machine) == {"p": Share((1, 2)), "d": Share((0, 3))}


def test_cores_are_shared_as_planned() -> None:
    plan = placement(
        planned_replica("p", "prefill", stage("cpu")),
        planned_replica("d", "decode", stage("cpu-0.5", 2)),
    )
    assert shares(plan, Machine((), 2)) == {"p": Share((), 1.0), "d": Share((), 1.0)}
    with pytest.raises(ConfigError, match="it takes 2 CPU cores, and 1 are here"):
        shares(plan, Machine((), 1))


def test_other_hardware_is_refused_with_what_differs_and_what_to_do() -> None:
    plan = placement(
        planned_replica("p", "prefill", stage("A100-SXM", 4)), planned_replica("d", "decode", stage("L40"))
    )
    with pytest.raises(ConfigError) as caught:
        shares(plan, Machine(("NVIDIA A100-SXM4-80GB", "NVIDIA H200"), 8))
    assert str(caught.value).startswith(
        "the plan is for other hardware than this machine has: it takes 4 A100-SXM, and 1 is here; it takes 1 L40, and "
        "1 NVIDIA A100-SXM4-80GB, 1 NVIDIA H200 is here. Start it where that is"
    )
    with pytest.raises(ConfigError, match="it takes 4 A100-SXM, and no GPU is here"):
        shares(plan, Machine((), 8))
    both = placement(planned_replica("p", "prefill", stage("cpu", 1, 0, 20), stage("L40", 1, 20, 20)))
    with pytest.raises(ConfigError, match="replica p is on GPUs and CPU cores at once"):
        shares(both, Machine(("NVIDIA L40",), 8))
