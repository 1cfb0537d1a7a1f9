# The mini recipe of UperNet at the size of fpn_tiny.py.
_base_ = '../../configs/mini/upernet_inceptionnext_a.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            depths=(1, 1, 1, 1),
            channels=(16, 32, 48, 64),
            mlp_ratios=(2, 2, 2, 2),
            band_kernel_size=5,
            square_kernel_size=3,
            branch_ratio=0.25,
        ),
    ),
    decode_head=dict(in_channels=[16, 32, 48, 64], channels=16),
    auxiliary_head=dict(in_channels=48, channels=16),
)
