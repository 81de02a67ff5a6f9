"""Data: sources, packing, and batches that are a pure function of seed and step."""

from logitjax.data._examples import Examples as Examples
from logitjax.data._forms import own_form as own_form
from logitjax.data._image_set import ImageSet as ImageSet
from logitjax.data._image_set import load_image_set as load_image_set
from logitjax.data._image_views import ImageViews as ImageViews
from logitjax.data._images import read_picture as read_picture
from logitjax.data._load import load_examples as load_examples
from logitjax.data._load import prepare as prepare
from logitjax.data._pack import pack as pack
from logitjax.data._packed import PackedDataset as PackedDataset
from logitjax.data._recognition import RECOGNITION_SETS as RECOGNITION_SETS
from logitjax.data._splits import SPLITS as SPLITS
from logitjax.data._splits import PackedSplits as PackedSplits
from logitjax.data._splits import load_splits as load_splits
from logitjax.data._splits import pack_splits as pack_splits
from logitjax.data._tokenizer import TokenizerLike as TokenizerLike
from logitjax.data._windows import token_windows as token_windows
