"""Image networks in flax.nnx: classifiers of the distillation literature, and frozen encoders.

The parameter trees follow the names of the torch checkpoints they can be loaded from.
"""

from logitjax.vision._classifier import MODELS as MODELS
from logitjax.vision._classifier import ImageClassifier as ImageClassifier
from logitjax.vision._classifier import create_classifier as create_classifier
from logitjax.vision._classifier import parameter_count as parameter_count
from logitjax.vision._clip import CLIP as CLIP
from logitjax.vision._clip import ModifiedResNet as ModifiedResNet
from logitjax.vision._clip import VisionTransformer as VisionTransformer
from logitjax.vision._clip_config import CLIPConfig as CLIPConfig
from logitjax.vision._clip_tokenizer import CLIPTokenizer as CLIPTokenizer
from logitjax.vision._clip_tokenizer import load_clip_tokenizer as load_clip_tokenizer
from logitjax.vision._conv_features import ConvFeatures as ConvFeatures
from logitjax.vision._conv_features import alexnet_features as alexnet_features
from logitjax.vision._conv_features import vgg16_features as vgg16_features
from logitjax.vision._efficientnet import EfficientNetLite0 as EfficientNetLite0
from logitjax.vision._encoder import Encoder as Encoder
from logitjax.vision._encoder import zero_shot_classifier as zero_shot_classifier
from logitjax.vision._load_encoder import load_encoder as load_encoder
from logitjax.vision._mobilenet import MobileNetV2 as MobileNetV2
from logitjax.vision._preprocessing import Preprocessing as Preprocessing
from logitjax.vision._resnet import CifarResNet as CifarResNet
from logitjax.vision._resnet import ResNet as ResNet
from logitjax.vision._shufflenet import ShuffleNetV2 as ShuffleNetV2
from logitjax.vision._torch_layout import load_torch_weights as load_torch_weights
from logitjax.vision._torch_layout import to_torch_weights as to_torch_weights
from logitjax.vision._torch_layout import torch_names as torch_names
from logitjax.vision._vgg import VGG as VGG
from logitjax.vision._wide_resnet import WideResNet as WideResNet
