"""Which prompts a decode replica alone answers sooner than prefill, transfer and decode together do.

For each route: a prompt of so many tokens costs prefill's time and that of its KV on the way; on the decode replica
its own time there and, in the mean, half of the step that is under way when it comes.
"""

from functools import cache

from hexgen2.simulator.planned import Planned

#: Lengths that are looked at begin here and double; shorter prompts share the shortest one's answer.
SHORTEST = 16


def colocate_max_prompt_tokens(planned: Planned) -> int:
    """The longest length up to which all are answered sooner by decode alone, over the plan's flow; 0: none."""
    workload, cost = planned.problem.workload, planned.problem.cost
    longest = workload.longest_prompt_tokens
    batches = {replica.id: max(1, replica.batch or 1) for replica in planned.placement.replicas}
    stages = {end: planned.stages(end) for route in planned.placement.routes for end in (route.prefill, route.decode)}
    # Replicas of large clusters are alike: few kinds of stages, each asked for once.
    prefill_s, step_s = cache(cost.prefill_s), cache(cost.decode_step_s)

    def gain_s(tokens: int) -> float:
        """Of all routes together in a second of the plan's flow; below 0 it is a loss."""
        gain = 0.0
        for route in planned.placement.routes:
            before, after = stages[route.prefill], stages[route.decode]
            apart_s = prefill_s(before, tokens) + route.transfer_s * tokens / workload.mean_prompt_tokens
            wait_s = step_s(after, batches[route.decode], workload.mean_context_tokens) / 2
            gain += route.flow_rps * (apart_s - prefill_s(after, tokens) - wait_s)
        return gain

    found, tokens = 0, SHORTEST
    while tokens <= longest and planned.placement.routes and gain_s(tokens) > 0:
        found, tokens = tokens, 2 * tokens
    return found
