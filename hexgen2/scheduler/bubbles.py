"""Bubbles that prompts leave in the pipeline of a replica that does both phases.

A step with a prompt takes many times as long in each stage as a step of decode. Micro-batches that meet it on their way
pile up behind it, follow it through all stages, and leave the stages behind them idle meanwhile (Sarathi-Serve,
OSDI 2024, section 3.3; the same in mixed steps, whose prompts are as long). So where a *round* is one step of every
micro-batch, prompts that come in during a round cost it their time in the slowest stage each, and once the time that
the longest of their steps needs for the other stages.
"""

import numpy as np

from hexgen2.scheduler.kernels import Numbers

# Beyond it nothing changes any more, and its exponential is still a number.
_MOST = 700.0


def round_s(
    apart_s: Numbers, slowest_s: Numbers, prompts_s: Numbers, behind_s: Numbers, share: Numbers, num_stages: int
) -> Numbers:
    """Mean seconds of a round in a pipeline of ``num_stages`` with as many micro-batches.

    ``apart_s``: without prompts; ``slowest_s``: of the slowest stage's step of decode; ``prompts_s``: of the round's
    prompts in the slowest stage; ``behind_s``: of their longest step in the other stages; ``share``: rounds with any.
    """
    # Micro-batches are through with, or right behind, the prompts: all but one of each one's steps hide behind them.
    with_prompts_s = np.maximum(num_stages * slowest_s, behind_s + apart_s / num_stages)
    return np.asarray((1 - share) * apart_s + prompts_s + share * with_prompts_s)


def prompts_s(
    mean: Numbers, share: Numbers, full: Numbers, most: Numbers, alone_s: Numbers, shared_s: Numbers
) -> Numbers:
    """Mean seconds in the slowest stage of the prompts that one micro-batch lets in at a time, ``mean`` of them.

    ``share`` and ``full``: of ``trains``. A prompt by itself takes ``alone_s``; where ``most`` share a step, each takes
    ``shared_s``; between, one more prompt of a step adds as much as another.
    """
    first_step = share * (1 + full * (most - 1))
    one_more_s = np.maximum(0.0, most * shared_s - alone_s) / np.maximum(most - 1, 1e-9)
    return np.asarray(share * alone_s + (first_step - share) * one_more_s + (mean - first_step) * shared_s)


def trains(mean: Numbers, most: float) -> tuple[Numbers, Numbers]:
    """For each mean number of prompts in a turn, Poisson: the share of turns with any, and in these how full the
    longest step is, from 0 (one prompt) to 1 (``most`` prompts; more of them make more steps)."""
    mean = np.minimum(mean, _MOST)
    share = -np.expm1(-mean)
    if most <= 1:
        return share, np.zeros_like(share)
    # E[min(k, most)] - P(k > 0) = sum of P(k > j) over 0 < j < most, the last one in part.
    chance = np.exp(-mean)
    above, more = 1 - chance, np.zeros_like(mean)
    for number in range(1, int(np.ceil(most))):
        chance = chance * mean / number
        above = np.maximum(0.0, above - chance)
        more += above * min(1.0, most - number)
    return share, np.clip(more / (share * (most - 1)), 0.0, 1.0)
