"""Decoders in flax.nnx, their caches and adapters, and checkpoints in and out."""

from logitjax.models._apply import from_nnx as from_nnx
from logitjax.models._cache import Cache as Cache
from logitjax.models._config import DecoderConfig as DecoderConfig
from logitjax.models._decoder import Decoder as Decoder
from logitjax.models._draft_head import DraftHead as DraftHead
from logitjax.models._export import save_pretrained as save_pretrained
from logitjax.models._families import register_family as register_family
from logitjax.models._family import Family as Family
from logitjax.models._hf_config import config_from_hf as config_from_hf
from logitjax.models._hf_config import config_to_hf as config_to_hf
from logitjax.models._layout import first_layers as first_layers
from logitjax.models._layout import keep_layers as keep_layers
from logitjax.models._layout import with_layout as with_layout
from logitjax.models._load import load_config as load_config
from logitjax.models._load import load_model as load_model
from logitjax.models._load import load_sampling as load_sampling
from logitjax.models._load_tokenizer import load as load
from logitjax.models._load_tokenizer import load_tokenizer as load_tokenizer
from logitjax.models._lora import Lora as Lora
from logitjax.models._quantize import quantize as quantize
from logitjax.models._rules import DECODER_RULES as DECODER_RULES
from logitjax.models._tokenizer import Tokenizer as Tokenizer
