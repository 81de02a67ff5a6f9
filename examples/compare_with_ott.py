# %% [markdown]
# # How far from the optimum is a Gromov-Wasserstein solver?
#
# A solver says what its plan costs, not how much less another might. `transport.certificate` takes
# ott's problem and solution as they are: it repairs the plan's marginals, says what it then costs
# at most, and what no plan costs less than. Offline, two minutes on a CPU. POT is called where it
# is installed; its plan is an array, which says nothing of itself.

# %%
import importlib.util

import jax
import numpy as np
from ott.geometry.pointcloud import PointCloud
from ott.problems.quadratic.quadratic_problem import QuadraticProblem
from ott.solvers.linear.sinkhorn import Sinkhorn
from ott.solvers.quadratic.gromov_wasserstein import GromovWasserstein
from ott.solvers.quadratic.gromov_wasserstein_lr import LRGromovWasserstein

from logitjax import transport

entropic = GromovWasserstein(Sinkhorn(), epsilon=0.05, max_iterations=50)
low_rank = LRGromovWasserstein(rank=5, max_iterations=20)


def problem_of(n):
    """Points on an arm of a spiral, and the same shape, bent a little into three dimensions."""
    rng = np.random.default_rng(n)
    t, u = np.sort(rng.random((2, n)), axis=1)
    x = np.stack([t * np.cos(4 * t), t * np.sin(4 * t)], 1)
    y = np.stack([u * np.cos(5 * u), u * np.sin(5 * u), 0.2 * u**2], 1)
    return QuadraticProblem(PointCloud(np.float32(x)), PointCloud(np.float32(y)))


# %% [markdown]
# Up to 300 nodes every solver runs. Beyond, neither ott's low-rank solver nor the certificate forms
# a matrix of all pairs. `closed form` is the sort that InfiGFusion takes for the distance.

# %%
print("nodes  solution it says   converged  costs at most  lower     closed form")
for n in (30, 300, 3_000, 20_000):
    problem, solutions = problem_of(n), {}
    if n <= 300:
        solutions["ott"] = jax.jit(entropic)(problem)
        if importlib.util.find_spec("ot"):
            ot = importlib.import_module("ot")
            c, d = (np.float64(g.cost_matrix) for g in (problem.geom_xx, problem.geom_yy))
            solutions["POT"] = ot.gromov.gromov_wasserstein(c, d, loss_fun="square_loss")
    solutions["low rank"] = jax.jit(low_rank)(problem)
    answer = transport.certificate(problem, candidates=list(solutions.values()))
    means = [g.apply_cost(np.full((n, 1), 1 / n))[:, 0] for g in (problem.geom_xx, problem.geom_yy)]
    closed = transport.sorted_gw_lower_bound(*means, p=2)
    row = f"{float(answer.lower):.6f}  {float(closed):.6f}"
    for i, name in enumerate(solutions):
        cost_and_status = f"{float(answer.reported[i]):.6f}  {bool(answer.converged[i])!s:9}"
        print(f"{n:<6} {name:8} {cost_and_status}  {float(answer.costs[i]):.6f}       {row}")
    print(f"{n:<6} {'best':8} {'':19}  {float(answer.upper):.6f}       {row}")
    assert closed * 0.999 <= answer.lower <= answer.upper <= answer.costs.min()
print("worked: every solution lies between what is proven and what its plan costs")
