_base_ = './inceptionnext_t.py'
model = dict(
    backbone=dict(
        arch='base',
        drop_path_rate=0.4,  # Table 10
        init_cfg=dict(
            checkpoint='https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_base.pth',
        ),
    ),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
