_base_ = '../_base_/imagenet.py'
