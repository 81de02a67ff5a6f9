"""Decoders in flax.nnx, their caches and adapters, and checkpoints in and out."""

from logitjax.models._apply import from_linen as from_linen
from logitjax.models._apply import from_nnx as from_nnx
from logitjax.models._cache import Cache as Cache
from logitjax.models._cache import init_cache as init_cache
from logitjax.models._config import DecoderConfig as DecoderConfig
from logitjax.models._config import RopeScaling as RopeScaling
from logitjax.models._config import SegmentSpec as SegmentSpec
from logitjax.models._decoder import Decoder as Decoder
from logitjax.models._decoder import num_params as num_params
from logitjax.models._hf_config import config_from_hf as config_from_hf
from logitjax.models._layout import cache_with_layout as cache_with_layout
from logitjax.models._layout import keep_layers as keep_layers
from logitjax.models._layout import lora_with_layout as lora_with_layout
from logitjax.models._layout import params_with_layout as params_with_layout
from logitjax.models._layout import with_layout as with_layout
from logitjax.models._load import load_config as load_config
from logitjax.models._load import load_model as load_model
from logitjax.models._lora import Lora as Lora
from logitjax.models._lora import init_lora as init_lora
from logitjax.models._tokenizer import Tokenizer as Tokenizer
from logitjax.models._tokenizer import check_tokenizer as check_tokenizer
from logitjax.models._tokenizer import load_tokenizer as load_tokenizer
