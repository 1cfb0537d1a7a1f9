# Swin-T; the recipe around the backbone is that of InceptionNeXt.
_base_ = '../../upernet/inceptionnext_t.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=96,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.3,
    ),
    decode_head=dict(type='UPerHead'),  # mmseg's own, as its users run it
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(relative_position_bias_table=dict(decay_mult=0.0))))
