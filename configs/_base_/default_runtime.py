custom_imports = dict(imports=['mmseg_inceptionnext'], allow_failed_imports=False)
default_scope = 'mmseg'
runner_type = 'SafeRunner'
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='SafeCheckpointHook', by_epoch=False, interval=4000, max_keep_ckpts=2, save_best='mIoU'),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),  # draws nothing, unless mmseg's test.py --show-dir asks it to
)
custom_hooks = [
    dict(type='SeedIterationHook'),
    dict(type='StopOnNonFiniteLossHook'),
    dict(type='ValidationSamplesHook', num_images=4),
]
env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)
visualizer = dict(
    type='SegLocalVisualizer',
    name='visualizer',
    vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')],
)
tta_model = dict(type='SegTTAModel')  # of mmseg's test.py --tta; ours needs less memory
log_processor = dict(by_epoch=False)
log_level = 'INFO'
