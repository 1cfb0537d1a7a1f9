"""Weights, gradients and optimizer states divided among the processes of a run."""

from __future__ import annotations

from mmengine._strategy.fsdp import FSDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType

from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.inceptionnext import InceptionNeXtBlock
from mmseg_inceptionnext.processes import world_size


def use_fsdp(cfg: Config) -> None:
    """Change a config, in place, so that :class:`SafeFlexibleRunner` runs it and its processes share one model.

    Raises:
        UserError: the run has one process, its processes were not started by torchrun or srun, or the config asks for
            something that mmengine does otherwise under FSDP.
    """
    if world_size(cfg) == 1:
        raise UserError('--strategy fsdp divides the model among several processes: start them, see docs/scaling.md')
    if cfg.launcher == 'mpi':  # LOCAL_RANK, which mmengine's strategies ask for, is not set
        raise UserError('--strategy fsdp runs under --launcher pytorch or slurm, not mpi: start it by one of them')
    if cfg.optim_wrapper.get('clip_grad'):  # by the norm of each process's share
        raise UserError('--strategy fsdp cannot clip gradients as the config asks: drop optim_wrapper.clip_grad')
    if cfg.optim_wrapper.get('constructor') or 'flat_decay_mult' in (cfg.optim_wrapper.get('paramwise_cfg') or {}):
        # Shares have one dimension, and names of their own.
        raise UserError('--strategy fsdp: optim_wrapper.constructor and flat_decay_mult would see shares of parameters')
    cfg.strategy = dict(type='ShardedStrategy')


@FUNCTIONS.register_module()
def is_inceptionnext_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """An ``auto_wrap_policy``: the weights of one block at a time are gathered from the processes.

    Stem, downsampling, neck and heads stay together: mmseg calls heads by other methods than ``forward``, which is what
    FSDP gathers weights for, and :class:`~mmseg_inceptionnext.LateUpsampleUPerHead` reads those of its layers.
    """
    return recurse or isinstance(module, InceptionNeXtBlock)


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """mmengine's FSDPStrategy, whose checkpoints are those of a run without it, and load into one.

    mmengine's own have names of parameters where optimizers have numbers, leave out the loss scale of float16, hold
    tensors with attributes, which only unrestricted unpickling reads, and are loaded with the arguments of torch 2.0.
    """

    def __init__(self, **kwargs):
        on_cpu = get_device() == 'cpu'
        # On a CPU, offloading copies nothing: all tensors would be views of one buffer that torch uses again and again.
        where = dict(offload_to_cpu=not on_cpu, rank0_only=True)
        kwargs = {
            'model_wrapper': dict(
                type='MMFullyShardedDataParallel',
                use_orig_params=True,  # whose names and settings of weight decay are the config's
                auto_wrap_policy='is_inceptionnext_block',
                **(dict(device_id='cpu') if on_cpu else {}),
            ),
            'state_dict_cfg': dict(
                state_dict_type='FULL_STATE_DICT',
                state_dict_config=dict(type='FullStateDictConfig', **where),
                optim_state_dict_config=dict(type='FullOptimStateDictConfig', **where),
            ),
            **kwargs,
        }
        super().__init__(**kwargs)

    def build_optim_wrapper(self, optim_wrapper: dict, model: nn.Module) -> BaseOptimWrapper:
        """mmengine's, if the names that FSDP gives parameters match the same ``custom_keys`` as those of the config.

        Raises:
            UserError: one of them does not.
        """
        keys = (optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys', ())
        for name, _ in model.named_parameters():
            for key in keys:
                if (key in name) != (key in name.replace('_fsdp_wrapped_module.', '')):
                    raise UserError(
                        f'--strategy fsdp: optim_wrapper.paramwise_cfg.custom_keys {key!r} reaches into a block, where '
                        "mmengine does not find it: name what is behind the block's number"
                    )
        return super().build_optim_wrapper(optim_wrapper, model)

    def model_state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in super().model_state_dict().items()}

    def optim_state_dict(self) -> dict:
        optimizer = self.optim_wrapper.optimizer
        named = FSDP.optim_state_dict(self.model, optimizer)
        if not named:  # only the first process gets it, and writes
            return {}
        numbered = FSDP.rekey_optim_state_dict(named, OptimStateKeyType.PARAM_ID, self.model, optim=optimizer)
        return {**self.optim_wrapper.state_dict(), **numbered}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        optimizer = self.optim_wrapper.optimizer
        named = FSDP.rekey_optim_state_dict(state_dict, OptimStateKeyType.PARAM_NAME, self.model, optim=optimizer)
        sharded = FSDP.optim_state_dict_to_load(self.model, optimizer, named)
        self.optim_wrapper.load_state_dict({**state_dict, **sharded})
