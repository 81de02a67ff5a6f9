"""The sweep over the vocabulary."""

from logitjax.losses.sweep._blocks import Blocks as Blocks
from logitjax.losses.sweep._head import Head as Head
from logitjax.losses.sweep._kl import KLStatistic as KLStatistic
from logitjax.losses.sweep._readout import ReadoutStatistic as ReadoutStatistic
from logitjax.losses.sweep._run import run as run
from logitjax.losses.sweep._statistic import LogitBlock as LogitBlock
from logitjax.losses.sweep._statistic import OnlineSums as OnlineSums
from logitjax.losses.sweep._statistic import Statistic as Statistic
