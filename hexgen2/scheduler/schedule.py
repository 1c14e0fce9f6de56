"""`schedule(cluster, model, workload)` returns the plan: the one entry of the scheduler."""

from pathlib import Path

from hexgen2 import llm as llms
from hexgen2.cluster import Cluster
from hexgen2.cluster_file import find_cluster
from hexgen2.errors import ConfigError
from hexgen2.kv.codecs import NONE
from hexgen2.llm import Llm
from hexgen2.placement import Placement
from hexgen2.scheduler.multi_start import Effort, Progress
from hexgen2.scheduler.present import placement
from hexgen2.scheduler.problem import MIXED, SPLIT, WHOLE, Problem
from hexgen2.scheduler.search import strategy
from hexgen2.workload import Workload
from hexgen2.workload_file import find_workload

#: Evaluations of a search when nothing else is said.
EVALUATIONS = 4000

#: Strategies that can be told which kind of plan to make.
CHOOSING = ("hexgen2", "exhaustive")

#: What a plan may be, by name: None lets the search choose.
KINDS: dict[str, tuple[str, ...] | None] = {"auto": None, "disaggregated": SPLIT, "colocated": WHOLE, "mixed": MIXED}


def schedule(
    cluster: Cluster | str | Path,
    model: Llm | str | Path,
    workload: Workload | str | Path,
    *,
    strategy: str = "hexgen2",
    kind: str = "auto",
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    jobs: int = 1,
    codecs: tuple[str, ...] = (NONE,),
    progress: Progress | None = None,
) -> Placement:
    """The best placement that the strategy finds, with its bound.

    ``cluster``, ``model`` and ``workload`` may be files or names of the catalog. ``codecs`` are those that routes
    between machines may use. The same arguments give the same plan, byte for byte, whatever ``jobs``. Raises
    ConfigError when something is not known or nothing can serve.
    """
    problem = Problem(
        cluster if isinstance(cluster, Cluster) else find_cluster(cluster),
        model if isinstance(model, Llm) else llms.find(model),
        workload if isinstance(workload, Workload) else find_workload(workload),
        codecs,
    )
    return solve(problem, strategy, kind=kind, evaluations=evaluations, seed=seed, jobs=jobs, progress=progress)


def solve(
    problem: Problem,
    name: str = "hexgen2",
    *,
    kind: str = "auto",
    evaluations: int = EVALUATIONS,
    seed: int = 0,
    jobs: int = 1,
    exact: bool = True,
    progress: Progress | None = None,
) -> Placement:
    """The plan of a problem that is built already; ``exact`` as in `Effort`. Raises ConfigError."""
    if kind not in KINDS:
        raise ConfigError(f"kind: no `{kind}`; there are: {', '.join(KINDS)}")
    problem.check()
    roles = KINDS[kind]
    if roles is not None and problem.bound(roles).rps <= 0:
        reason = f": {problem.why_not_apart()}" if roles == SPLIT else ""
        raise ConfigError(
            f"kind {kind}: cluster {problem.cluster.name} cannot serve model {problem.llm.name} so{reason}; "
            "without --kind the best there is, is planned"
        )
    if roles is not None and name not in CHOOSING:
        raise ConfigError(f"kind {kind}: strategy {name} plans one kind alone; {' and '.join(CHOOSING)} have a choice")
    effort = Effort(evaluations, seed, jobs, roles, exact=exact, progress=progress)
    found = strategy(name)(problem, effort)
    if found.flow <= 0:
        reason = f"; {why}" if (why := problem.why_not_apart()) else ""
        raise ConfigError(
            f"strategy {name}: no plan found that serves model {problem.llm.name} on {problem.cluster.name}{reason}"
        )
    return placement(problem, found, name, seed, roles)
