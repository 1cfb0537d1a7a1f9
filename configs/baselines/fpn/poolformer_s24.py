# PoolFormer-S24 of timm; the recipe around the backbone is that of InceptionNeXt.
_base_ = '../../fpn/inceptionnext_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='poolformer_s24',
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.1,
    ),
    neck=dict(in_channels=[64, 128, 320, 512]),
)
