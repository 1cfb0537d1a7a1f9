# mmseg's Semantic FPN on timm's InceptionNeXt-T.
_base_ = '../configs/fpn/inceptionnext_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='inception_next_tiny',
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2, 3),
    )
)
