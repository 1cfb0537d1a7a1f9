# ConvNeXt-T of timm; the recipe around the backbone is that of InceptionNeXt.
_base_ = '../../upernet/inceptionnext_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMBackbone',
        model_name='convnext_tiny',
        features_only=True,
        pretrained=False,
        out_indices=(0, 1, 2, 3),
        drop_path_rate=0.4,
    ),
    decode_head=dict(type='UPerHead'),  # mmseg's own, as its users run it
)
