"""Readers of weights in common formats; none runs code from the file."""

from logitjax.storage._numpy_files import read_npy as read_npy
from logitjax.storage._numpy_files import read_npz as read_npz
from logitjax.storage._numpy_files import read_numpy_pickle as read_numpy_pickle
from logitjax.storage._safetensors import SafetensorsSource as SafetensorsSource
from logitjax.storage._torch_checkpoint import read_state_dict as read_state_dict
