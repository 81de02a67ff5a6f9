"""Making a model forget, and measuring whether it has: methods, assistants, verdicts.

`METHODS` has the methods by name, each a `Method`: a frozen dataclass that declares its readings of
a batch and its loss. Most train a model's own weights. The default trains an `Assistant`, whose
logits are subtracted during decoding (`Assistant.beside`). `Unlearning` runs either on your own
rows, and chooses without a retrained model.
"""

from logitjax.unlearning._method import Method as Method
from logitjax.unlearning._method import TwoSided as TwoSided
from logitjax.unlearning._questions import Questions as Questions
from logitjax.unlearning._reads import Need as Need
from logitjax.unlearning._rows import Row as Row
from logitjax.unlearning._selection import share_interval as share_interval
from logitjax.unlearning._split import split_rows as split_rows
from logitjax.unlearning._unlearn import Unlearning as Unlearning
from logitjax.unlearning._unlearn_config import UnlearnConfig as UnlearnConfig
from logitjax.unlearning._verdict import judge as judge
from logitjax.unlearning.assistant._assistant import Assistant as Assistant
from logitjax.unlearning.assistant._deployed import Deployed as Deployed
from logitjax.unlearning.measures._examine import examine as examine
from logitjax.unlearning.measures._membership import memorisation as memorisation
from logitjax.unlearning.measures._relearn import relearning as relearning
from logitjax.unlearning.methods import METHODS as METHODS
