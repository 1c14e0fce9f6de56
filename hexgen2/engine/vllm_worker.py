"""vLLM's CPU worker, mended for pipelines.

Without compilation vLLM 0.32 skips the CPU's warm-up, and with it makes no buffers for what a later stage receives
from the one before: its first step then fails.
"""

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker


class PipelineCpuWorker(CPUWorker):
    """One rank of a pipeline on CPUs."""

    def compile_or_warm_up_model(self) -> Any:
        """Make the buffers that the warm-up would have made."""
        from vllm.distributed import get_pp_group

        result = super().compile_or_warm_up_model()
        runner = self.model_runner
        if not get_pp_group().is_first_rank and runner.intermediate_tensors is None:
            runner.intermediate_tensors = runner.model.make_empty_intermediate_tensors(
                batch_size=runner.max_num_tokens, dtype=runner.model_config.dtype, device=runner.device
            )
        return result
