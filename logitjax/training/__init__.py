"""Training: mesh, sharding, one jitted step, checkpoints, metrics, and a loop that resumes.

A run is a few calls: `distributed.initialize`, `make_mesh`, `Schedule.optimizer`,
`TrainState.create`, `TrainStep`, `train_loop`.
"""

from logitjax.training import distributed as distributed
from logitjax.training._checkpoints import Checkpointer as Checkpointer
from logitjax.training._flops import matmul_flops as matmul_flops
from logitjax.training._goodput import Goodput as Goodput
from logitjax.training._loop import LoopOptions as LoopOptions
from logitjax.training._loop import train_loop as train_loop
from logitjax.training._mesh import BatchLayout as BatchLayout
from logitjax.training._mesh import make_mesh as make_mesh
from logitjax.training._metrics import make_writer as make_writer
from logitjax.training._optimizers import Schedule as Schedule
from logitjax.training._preemption import Preempted as Preempted
from logitjax.training._preemption import watch_for_preemption as watch_for_preemption
from logitjax.training._program import Program as Program
from logitjax.training._state import TrainState as TrainState
from logitjax.training._step import EvalStep as EvalStep
from logitjax.training._step import LossFn as LossFn
from logitjax.training._step import StepOutput as StepOutput
from logitjax.training._step import TrainStep as TrainStep
from logitjax.training._workdir import lock_workdir as lock_workdir
