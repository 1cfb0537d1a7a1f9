# InceptionNeXt-A with a narrow UperNet on CamVid, from scratch; to train with --amp --ema --class-weights auto.
_base_ = [
    '../_base_/models/upernet_inceptionnext_t.py',
    '../_base_/datasets/camvid.py',
    '../_base_/schedules/camvid.py',
    '../_base_/default_runtime.py',
]
model = dict(
    data_preprocessor=dict(size={{_base_.crop_size}}),
    backbone=dict(arch='atto', layer_scale_init_value=1.0, drop_path_rate=0.05),  # see configs/mini
    decode_head=dict(in_channels=[40, 80, 160, 320], channels=128, num_classes=11),
    auxiliary_head=dict(in_channels=160, channels=64, num_classes=11),
)
default_hooks = dict(checkpoint=dict(interval=500))
