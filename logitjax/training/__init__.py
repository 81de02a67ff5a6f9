"""Training: mesh, sharding, one jitted step, checkpoints, metrics, a loop that survives.

A run is a few calls: :func:`distributed.initialize`, :func:`make_mesh`, :func:`make_optimizer`,
:func:`create_train_state`, :func:`make_train_step`, :func:`train_loop`.
"""

from logitjax.training import distributed as distributed
from logitjax.training._checkpoints import Checkpointer as Checkpointer
from logitjax.training._loop import LoopOptions as LoopOptions
from logitjax.training._loop import NonFiniteError as NonFiniteError
from logitjax.training._loop import train_loop as train_loop
from logitjax.training._mesh import batch_sharding as batch_sharding
from logitjax.training._mesh import local_rows as local_rows
from logitjax.training._mesh import make_global_batch as make_global_batch
from logitjax.training._mesh import make_mesh as make_mesh
from logitjax.training._mesh import make_partial_mesh as make_partial_mesh
from logitjax.training._mesh import process_slice as process_slice
from logitjax.training._metrics import make_writer as make_writer
from logitjax.training._optimizers import Schedule as Schedule
from logitjax.training._optimizers import make_optimizer as make_optimizer
from logitjax.training._preemption import Preempted as Preempted
from logitjax.training._preemption import watch_for_preemption as watch_for_preemption
from logitjax.training._program import Program as Program
from logitjax.training._sharding import shard_tree as shard_tree
from logitjax.training._stalls import LOST_STATUS as LOST_STATUS
from logitjax.training._state import TrainState as TrainState
from logitjax.training._state import abstract_train_state as abstract_train_state
from logitjax.training._state import create_train_state as create_train_state
from logitjax.training._step import LossFn as LossFn
from logitjax.training._step import StepOutput as StepOutput
from logitjax.training._step import TrainStep as TrainStep
from logitjax.training._step import evaluate as evaluate
from logitjax.training._step import make_eval_step as make_eval_step
from logitjax.training._step import make_train_step as make_train_step
from logitjax.training._workdir import WorkdirInUseError as WorkdirInUseError
from logitjax.training._workdir import lock_workdir as lock_workdir
