_base_ = './convnext_t.py'
model = dict(
    backbone=dict(model_name='convnext_base'),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
