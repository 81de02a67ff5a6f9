"""Learning from a few labelled images with a frozen zero-shot classifier.

- `read_pictures` reads encoded pictures. `fit` chooses a head's settings and trains it; the head
  can predict and be saved, and `load` reads it.
- `methods` contains AMU and the methods it is compared with. `Candidate.all` adds a recipe and the
  settings to choose from.
- Methods learn from `Inputs` and a `FewShotTask`. A `Recipe` trains one method; `sweep` trains and
  scores it on many samples with a grid of settings.
- `extract_features` fills the `FeatureCache` of a frozen encoder.
"""

from logitjax.few_shot import methods as methods
from logitjax.few_shot._candidates import Candidate as Candidate
from logitjax.few_shot._feature_cache import FeatureCache as FeatureCache
from logitjax.few_shot._feature_cache import FeatureIdentity as FeatureIdentity
from logitjax.few_shot._feature_cache import Features as Features
from logitjax.few_shot._feature_cache import extract_features as extract_features
from logitjax.few_shot._head import fit as fit
from logitjax.few_shot._head import load as load
from logitjax.few_shot._labelled import Pictures as Pictures
from logitjax.few_shot._labelled import read_pictures as read_pictures
from logitjax.few_shot._method import FewShotTask as FewShotTask
from logitjax.few_shot._method import Inputs as Inputs
from logitjax.few_shot._method import Method as Method
from logitjax.few_shot._mixture import recommend as recommend
from logitjax.few_shot._sweep import best_setting as best_setting
from logitjax.few_shot._sweep import sweep as sweep
from logitjax.few_shot._towers import tune_towers as tune_towers
from logitjax.few_shot._train import Recipe as Recipe
from logitjax.few_shot._transduction import adapt_online as adapt_online
from logitjax.few_shot._transduction import transduce as transduce
