# timm's InceptionNeXt-T in mmseg's wrapper.
stock_backbone = dict(
    type='TIMMBackbone',
    model_name='inception_next_tiny',
    features_only=True,
    pretrained=False,
    out_indices=(0, 1, 2, 3),
)
