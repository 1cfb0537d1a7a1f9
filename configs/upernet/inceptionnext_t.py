_base_ = [
    '../_base_/models/upernet_inceptionnext_t.py',
    '../_base_/datasets/ade20k.py',
    '../_base_/schedules/upernet_160k.py',
    '../_base_/default_runtime.py',
]
train_dataloader = dict(batch_size=2)  # of 16 = 8 GPUs × 2
model = dict(
    backbone=dict(
        drop_path_rate=0.2,  # Table 10
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/sail-sg/inceptionnext/releases/download/model/inceptionnext_tiny.pth',
        ),
    )
)
