# The mini recipe at a size for tests: an iteration takes a tenth of a second.
_base_ = '../../configs/mini/fpn_inceptionnext_a.py'
model = dict(
    backbone=dict(
        arch=dict(
            _delete_=True,
            depths=(1, 1, 2, 1),
            channels=(16, 32, 48, 64),
            mlp_ratios=(2, 2, 2, 2),
            band_kernel_size=5,
            square_kernel_size=3,
            branch_ratio=0.25,
        ),
        drop_path_rate=0.2,
    ),
    neck=dict(in_channels=[16, 32, 48, 64], out_channels=16),
    decode_head=dict(in_channels=[16, 16, 16, 16], channels=16),
)
# Without workers: a runner that is dropped inside a test waits five seconds for each of them.
train_dataloader = dict(batch_size=2, num_workers=0, persistent_workers=False)
val_dataloader = dict(num_workers=0, persistent_workers=False)
test_dataloader = val_dataloader
train_cfg = dict(max_iters=6, val_interval=6)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=3))
