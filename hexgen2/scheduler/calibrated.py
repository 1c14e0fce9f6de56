"""A cluster whose devices are as slow, or as quick, as a running plan's replicas were measured to be. Pure."""

from hexgen2.cluster import Cluster, GpuType, HostTimes, Reached
from hexgen2.device_factors import Factors
from hexgen2.scheduler.efficiency import Engine, Host, efficiency


def calibrated(cluster: Cluster, factors: Factors, profile: Engine) -> Cluster:
    """The cluster with every such device's figures scaled: computing by prefill's factor, reading by decode's.

    Small errors of what binds neither way remain; they show in the next plan's calibration, and shrink with it.
    """
    types = tuple(
        _scaled(gpu, *factors[gpu.name], profile) if gpu.name in factors else gpu for gpu in cluster.gpu_types
    )
    return cluster.model_copy(update={"gpu_types": types})


def _scaled(gpu: GpuType, prefill: float, decode: float, profile: Engine) -> GpuType:
    rates, host = efficiency(gpu), profile.host(gpu)
    reached = Reached(
        compute=rates.compute / prefill,
        memory=rates.memory / decode,
        gemm_s=rates.gemm_s * decode,
        blend=rates.blend,
        attention_compute=rates.attention_compute / prefill,
        attention_s=rates.attention_s * prefill,
        attention_memory=rates.attention_memory / decode,
        cached_attention_s=rates.cached_attention_s * decode,
    )
    return gpu.model_copy(update={"reached": reached, "host": _scaled_host(host, prefill, decode)})


def _scaled_host(host: Host, prefill: float, decode: float) -> HostTimes:
    """Steps of decode are where launching binds; work for each token is prefill's."""
    return HostTimes(
        step_s=host.step_s * decode,
        layer_s=host.layer_s * decode,
        request_s=host.request_s * decode,
        token_s=host.token_s * prefill,
        shared_token_s=host.shared_token_s * prefill,
    )
