_base_ = './poolformer_s24.py'
model = dict(backbone=dict(model_name='poolformer_s36'))
