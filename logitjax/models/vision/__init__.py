"""Image classifiers of the distillation literature, in flax.nnx: images in, features or logits out.

The parameter trees follow the names of the torch checkpoints they can be loaded from.
"""

from logitjax.models.vision._classifier import MODELS as MODELS
from logitjax.models.vision._classifier import ImageClassifier as ImageClassifier
from logitjax.models.vision._classifier import create_classifier as create_classifier
from logitjax.models.vision._classifier import parameter_count as parameter_count
from logitjax.models.vision._mobilenet import MobileNetV2 as MobileNetV2
from logitjax.models.vision._resnet import CifarResNet as CifarResNet
from logitjax.models.vision._resnet import ResNet as ResNet
from logitjax.models.vision._shufflenet import ShuffleNetV2 as ShuffleNetV2
from logitjax.models.vision._torch_layout import load_torch_weights as load_torch_weights
from logitjax.models.vision._torch_layout import to_torch_weights as to_torch_weights
from logitjax.models.vision._torch_layout import torch_names as torch_names
from logitjax.models.vision._vgg import VGG as VGG
from logitjax.models.vision._wide_resnet import WideResNet as WideResNet
