"""Files to start from: a cluster and a workload that ``hexgen2 plan`` takes as they are, with every field explained."""

from pathlib import Path

from hexgen2.errors import ConfigError

CLUSTER = """\
# A cluster for `hexgen2 plan`. Schema: docs/schemas/cluster.schema.json.
name: example

# GPUs that the catalog does not have, by numbers (it has H100-SXM, A100-SXM, L40S, L40, A6000, RTX-4090 ...).
# gpu_types:
#   my-gpu:
#     flops: 200e12                       # dense bf16 FLOP/s
#     memory_mib: 49152                   # as nvidia-smi prints it
#     memory_bandwidth_bytes_per_s: 900e9
#     link: pcie-4                        # to its neighbours; or {bandwidth_bytes_per_s: 25e9, latency_s: 5e-6}
#     price_per_hour: 0.80
#     efficiency: L40S                    # whose measured efficiencies it shares

# Network card of machines that name none: a class (10gbe, 25gbe, 40gbe, 100gbe, 200gbe, 400gbe), or what you measured.
nic: {bandwidth_bytes_per_s: 12.5e9, latency_s: 10e-6}

machines:
  - {name: a100, gpus: {A100-SXM: 4}}
  - {name: l40, count: 2, gpus: {L40: 4}}               # two alike, l40-0 and l40-1
  - {name: a6000, gpus: {A6000: 4}, site: annexe, nic: 25gbe, price_per_hour: 3.12}

# Between sites, and between single machines, where that is less than their network cards.
site_links:
  - {between: [default, annexe], link: 10gbe}
machine_links:
  - {between: [a100, l40-0], link: {bandwidth_bytes_per_s: 11.2e9, latency_s: 12e-6}}
"""

WORKLOAD = """\
# A workload for `hexgen2 plan`. Schema: docs/schemas/workload.schema.json.
name: example

# One of: `lengths: HPLD` (or HPHD, LPHD, LPLD, azure-conversation, azure-code, mooncake-conversation),
# `trace: requests.csv` (columns prompt_tokens,output_tokens; or JSON lines), `prompt_tokens:` with `output_tokens:`,
# or a mix of these:
mix:
  - {lengths: HPHD, share: 0.7}
  - {prompt_tokens: 200, output_tokens: 400, share: 0.3}

# Longest prompt that must be taken, in tokens: memory is kept for its KV. Without it: the longest of the above.
# max_prompt_tokens: 16000

# Requests per second that come; without it the plan serves as many as it can.
# rate: 3.0

# What a request may wait; without it there is no limit.
slo: {ttft_s: 5.0, tpot_s: 0.25}
"""


def write_examples(folder: Path) -> tuple[Path, Path]:
    """Write ``cluster.yaml`` and ``workload.yaml`` into ``folder``, made if need be; nothing is overwritten.

    Raises:
        ConfigError: one of them is there already, or the folder cannot be written to.
    """
    texts = {folder / "cluster.yaml": CLUSTER, folder / "workload.yaml": WORKLOAD}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
    except FileExistsError as error:
        raise ConfigError(f"{error.filename}: is there already; name another folder") from error
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: {error.strerror}") from error
    cluster, workload = texts
    return cluster, workload
