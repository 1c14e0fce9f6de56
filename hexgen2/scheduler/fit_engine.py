"""Fits an engine profile to whole steps of one model at one tensor-parallel degree, over kernels fitted elsewhere.

Only what belongs to the engine moves: its host's time, its serial part per token, and how much slower its attention is
than the kernels measured apart. Products and all-reduces stay as their own tables have them, so that other degrees of
tensor parallelism follow from these, and from nothing that was fitted here.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from hexgen2 import llm as llms
from hexgen2.cluster_file import catalog_gpu
from hexgen2.scheduler.cost_model import CostModel, even_stages
from hexgen2.scheduler.efficiency import DEFAULT, Efficiency, make_engine
from hexgen2.scheduler.fit_data import Measured
from hexgen2.workload import LengthClass, Workload

Array = NDArray[np.float64]

MODEL = "llama-2-70b"

#: One model has one number of layers, so a host's time per step and per layer cannot be told apart: so much is taken
#: to be the step's own.
STEP_SHARE = 0.1

#: GPUs that live in the hosts of others, which were measured.
SAME_HOST: Mapping[str, str] = {"H200-SXM": "H100-SXM"}

#: Of a step, in both phases; not fitted.
LIMITS: Mapping[str, Any] = {"max_num_seqs": 256, "max_num_batched_tokens": 2048}

#: Per GPU: host ms per step, host µs per request, serial ps per token, layer and element.
HOST_START, HOST_LOW, HOST_HIGH = [35.0, 200.0, 60.0, 20.0], [1.0, 0.0, 0.0, 0.0], [100.0, 2000.0, 1000.0, 1000.0]
#: For all: ms of a prefill step beside launching; factor of attention, within what older kernels can be blamed for.
START, LOW, HIGH = [20.0, 1.5], [0.0, 1.0], [100.0, 4.0]


class Prediction(NamedTuple):
    """A measured setting beside what the model says of it."""

    measured: Measured
    prompt_s: float
    token_s: float


def fit_engine(rows: Sequence[Measured], efficiencies: Mapping[str, Efficiency]) -> dict[str, Any]:
    """A profile's catalog entry."""
    gpus = sorted({row.gpu for row in rows})
    seconds = np.array([(row.prompt_s, row.token_s) for row in rows])

    def residuals(x: Array) -> Array:
        predicted = predict(rows, _entry(gpus, x), efficiencies)
        return np.asarray(np.log(np.array([(p.prompt_s, p.token_s) for p in predicted]) / seconds).ravel())

    count = len(gpus)
    start, low, high = (h * count + rest for h, rest in ((HOST_START, START), (HOST_LOW, LOW), (HOST_HIGH, HIGH)))
    found = least_squares(
        residuals, start, bounds=(low, high), loss="soft_l1", f_scale=0.05, x_scale=np.abs(start), diff_step=1e-3
    )
    return _entry(gpus, found.x)


def predict(
    rows: Sequence[Measured], entry: Mapping[str, Any], efficiencies: Mapping[str, Efficiency]
) -> tuple[Prediction, ...]:
    """What the cost model says with that profile. Contexts in decode are half way through the answer."""
    llm = llms.find(MODEL)
    gpus = {row.gpu: catalog_gpu(row.gpu) for row in rows}
    any_load = Workload(lengths=(LengthClass(prompt_tokens=1, output_tokens=1, weight=1.0),))
    costs = CostModel(llm, any_load, gpus.values(), make_engine("fit", entry), efficiencies=efficiencies)
    found = []
    for row in rows:
        stages = even_stages(llm, gpus[row.gpu], row.tensor_parallel_size)
        context = row.prompt_tokens + row.output_tokens / 2
        prompt_s = costs.prefill_s(stages, row.prompt_tokens, row.batch)
        found.append(Prediction(row, prompt_s, costs.decode_step_s(stages, row.batch, context)))
    return tuple(found)


def _entry(gpus: Sequence[str], x: Array) -> dict[str, Any]:
    layers = llms.find(MODEL).num_layers
    hosts = {}
    for number, gpu in enumerate(gpus):
        step_ms, request_us, token_ps, shared_ps = (float(value) for value in x[4 * number : 4 * number + 4])
        hosts[gpu] = {
            "step_s": step_ms * 1e-3 * STEP_SHARE,
            "layer_s": step_ms * 1e-3 * (1 - STEP_SHARE) / layers,
            "request_s": request_us * 1e-6,
            "token_s": token_ps * 1e-12,
            "shared_token_s": shared_ps * 1e-12,
        }
    # Hosts that were not measured: launching as the slowest of those that were, serial parts as the least (what the
    # other has beyond that is unexplained, and not to be spread).
    slowest = max(hosts.values(), key=lambda host: host["layer_s"])
    least = {name: min(host[name] for host in hosts.values()) for name in ("token_s", "shared_token_s")}
    hosts[DEFAULT] = {**slowest, **least}
    for gpu, like in SAME_HOST.items():
        if like in hosts:
            hosts[gpu] = dict(hosts[like])
    prefill_ms, prompt_factor = (float(value) for value in x[4 * len(gpus) :])
    return {
        **LIMITS,
        "prefill_s": prefill_ms * 1e-3,
        "prompt_attention_factor": prompt_factor,
        # Of 2023: steps of prefill alone went first (vLLM, SOSP 2023, section 4.5).
        "chunked_prefill": False,
        # Assumed: scale, round and write as separate kernels.
        "codec_passes": 8.0,
        "hosts": hosts,
    }
