"""A small LSTM that learns a series of arrival rates and says what comes next. Runs in a process of its own.

It is trained anew each time, on the newest buckets, for a bounded time: rates are few and change, and a model that is
never kept needs no care.
"""

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

#: Buckets that it looks back on, and the fewest windows that are worth learning from.
CONTEXT, ENOUGH = 24, 24
#: Newest buckets that it learns from, and its size.
MOST, HIDDEN = 2048, 16
SEED = 0


class _Net(nn.Module):
    """From ``[batch, CONTEXT, 3]`` (rate, sine and cosine of the season) to ``[batch]``."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, HIDDEN, batch_first=True)
        self.head = nn.Linear(HIDDEN, 1)

    def forward(self, windows: torch.Tensor) -> torch.Tensor:
        outputs, _ = self.lstm(windows)
        # The change from the last rate: to learn nothing is to say that it goes on as it is.
        changes: torch.Tensor = self.head(outputs[:, -1]).squeeze(-1)
        return windows[:, -1, 0] + changes


def forecast(rates: Sequence[float], horizon: int, season: int, train_s: float) -> float | None:
    """The mean rate of the next ``horizon`` buckets; None of too few ``rates``.

    Trains for at most ``train_s`` seconds, on one thread. ``season`` is in buckets.
    """
    first = max(0, len(rates) - MOST)
    rates = list(rates)[first:]
    count = len(rates) - CONTEXT - horizon + 1
    if count < ENOUGH:
        return None
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    scale = max(sum(rates) / len(rates), 1e-6)
    values = torch.tensor([rate / scale for rate in rates])
    angles = torch.arange(first, first + len(rates)) * (2 * math.pi / season)
    features = torch.stack([values, angles.sin(), angles.cos()], dim=1)
    windows = torch.stack([features[i : i + CONTEXT] for i in range(count)])
    targets = torch.stack([values[i + CONTEXT : i + CONTEXT + horizon].mean() for i in range(count)])
    net = _Net()
    optimiser = torch.optim.Adam(net.parameters(), lr=0.01)
    until = time.monotonic() + train_s
    for _ in range(300):
        optimiser.zero_grad()
        loss = nn.functional.smooth_l1_loss(net(windows), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if time.monotonic() > until:
            break
    with torch.no_grad():
        said = float(net(features[-CONTEXT:].unsqueeze(0))[0])
    return max(0.0, said * scale)
