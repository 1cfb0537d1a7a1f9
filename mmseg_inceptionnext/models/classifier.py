"""ImageNet classifiers: mmpretrain's ImageClassifier around our backbones, and the MLP head of the paper (Sec. 3.3)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from mmseg_inceptionnext.errors import MissingPackage
from mmseg_inceptionnext.models.weights import load_classifier

try:
    from mmpretrain.models import ClsHead, ImageClassifier
    from mmpretrain.registry import MODELS
except ImportError as error:
    raise MissingPackage(f'classifiers need mmpretrain ({error}): pip install mmseg-inceptionnext[imagenet]') from error


@MODELS.register_module()
class MlpClsHead(ClsHead):
    """Average pooling, a linear layer to three times the width, GELU, LayerNorm, dropout, and the classifier (Table 3).

    Parameter names are those of the released checkpoints and of timm.

    Args:
        in_channels: Channels of the last feature map.
        num_classes: Number of classes.
        dropout: Rate of the dropout before the classifier (Table 9).

    The other arguments are those of mmpretrain's ClsHead.

    Input: a tuple of feature maps, whose last is (N, in_channels, H, W). Output: logits (N, num_classes).
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float = 0.0, **kwargs):
        super().__init__(**kwargs)
        hidden = 3 * in_channels
        self.fc1 = nn.Linear(in_channels, hidden)
        self.act = nn.GELU()
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.drop = nn.Dropout(dropout)
        self.fc2 = nn.Linear(hidden, num_classes)
        for layer in (self.fc1, self.fc2):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)

    def pre_logits(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.norm(self.act(self.fc1(feats[-1].mean((2, 3)))))

    def forward(self, feats: tuple[Tensor, ...]) -> Tensor:
        return self.fc2(self.drop(self.pre_logits(feats)))


@MODELS.register_module()
class ImageNetClassifier(ImageClassifier):
    """mmpretrain's ImageClassifier, which loads pretrained weights all or not at all.

    Args:
        backbone, head, data_preprocessor: As of ImageClassifier; the preprocessor gets the head's number of classes.
        init_cfg: ``dict(type='Pretrained', checkpoint=X)`` loads a whole classifier, see
            :func:`~mmseg_inceptionnext.models.weights.load_classifier`.

    The other arguments are those of ImageClassifier.
    """

    def __init__(self, backbone: Mapping, head: Mapping, data_preprocessor: Mapping, **kwargs):
        # For mixed labels, which it would otherwise make with a note in the log.
        mixed = dict(num_classes=head['num_classes'], to_onehot=bool(kwargs.get('train_cfg')))
        data_preprocessor = {**data_preprocessor, **mixed}
        super().__init__(backbone, head=head, data_preprocessor=data_preprocessor, **kwargs)

    def init_weights(self) -> None:
        # mmengine's loader would take what fits and leave the rest.
        original, self.init_cfg = self.init_cfg, None
        super().init_weights()
        self.init_cfg = original
        if original:
            load_classifier(self, original['checkpoint'], finetune=True)
