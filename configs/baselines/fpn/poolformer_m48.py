_base_ = './poolformer_m36.py'
model = dict(backbone=dict(model_name='poolformer_m48'))
