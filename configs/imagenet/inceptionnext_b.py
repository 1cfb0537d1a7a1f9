_base_ = './inceptionnext_t.py'
model = dict(backbone=dict(arch='base', drop_path_rate=0.4), head=dict(in_channels=1024))  # Table 9
