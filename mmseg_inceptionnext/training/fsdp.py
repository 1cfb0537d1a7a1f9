"""FSDP: weights, gradients and optimizer states are divided among the ranks of a run."""

from __future__ import annotations

from mmengine._strategy.fsdp import FSDPStrategy
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from mmengine.registry import FUNCTIONS, STRATEGIES
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import OptimStateKeyType

from mmseg_inceptionnext.distributed import world_size
from mmseg_inceptionnext.errors import UserError
from mmseg_inceptionnext.models.metanext import MetaNeXtBlock


def check_fsdp(cfg: Config) -> None:
    """Check that a config can run under FSDP.

    Raises:
        UserError: The run has one process, its processes were not started by torchrun or srun, or the config asks for
            something that mmengine does differently under FSDP.
    """
    name = "strategy='fsdp'"
    if world_size(cfg.get('launcher', 'none')) == 1:
        raise UserError(f'{name} divides the model among several processes: start them, see docs/scaling.md')
    if cfg.launcher == 'mpi':  # LOCAL_RANK, which mmengine's strategies read, is not set
        raise UserError(f"{name} runs under launcher='pytorch' or slurm, not mpi: start it by one of them")
    if cfg.optim_wrapper.get('clip_grad'):  # mmengine clips by the norm of each rank's shard
        raise UserError(f'{name} cannot clip gradients as the config asks: drop optim_wrapper.clip_grad')
    if cfg.optim_wrapper.get('constructor') or 'flat_decay_mult' in (cfg.optim_wrapper.get('paramwise_cfg') or {}):
        # Shards are flat, and have other names.
        raise UserError(f'{name}: optim_wrapper.constructor and flat_decay_mult do not work on shards: drop them')


@FUNCTIONS.register_module()
def is_inceptionnext_block(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Return whether FSDP wraps a module, for its ``auto_wrap_policy``: ranks gather one block at a time.

    Stem, down-sampling, neck and heads stay together: FSDP gathers weights for ``forward``, mmseg calls heads by other
    methods, and :class:`~mmseg_inceptionnext.LateUpsampleUPerHead` reads the weights of its layers.
    """
    return recurse or isinstance(module, MetaNeXtBlock)


@STRATEGIES.register_module()
class ShardedStrategy(FSDPStrategy):
    """mmengine's FSDPStrategy, whose checkpoints are the same as without FSDP, and load without it.

    mmengine's checkpoints under FSDP have names of parameters where optimizers have numbers, lack the loss scale of
    float16, hold tensors with attributes, which only unrestricted unpickling reads, and are loaded with the arguments
    of torch 2.0.
    """

    def __init__(self, **kwargs):
        on_cpu = get_device() == 'cpu'
        # On a CPU, offloading copies nothing: all tensors would be views of one buffer that torch reuses.
        where = dict(offload_to_cpu=not on_cpu, rank0_only=True)
        kwargs = {
            'model_wrapper': dict(
                type='MMFullyShardedDataParallel',
                use_orig_params=True,  # keeps parameter names, which weight decay depends on
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
        """Build the optimizer wrapper; check that ``custom_keys`` match the same parameters as without FSDP.

        Raises:
            UserError: One of them does not.
        """
        keys = (optim_wrapper.get('paramwise_cfg') or {}).get('custom_keys', ())
        for name, _ in model.named_parameters():
            for key in keys:
                if (key in name) != (key in name.replace('_fsdp_wrapped_module.', '')):
                    raise UserError(
                        f"strategy='fsdp': optim_wrapper.paramwise_cfg.custom_keys {key!r} does not match under "
                        "FSDP, which renames blocks: use only the part after the block's number"
                    )
        return super().build_optim_wrapper(optim_wrapper, model)

    def model_state_dict(self) -> dict[str, Tensor]:
        return {name: tensor.detach() for name, tensor in super().model_state_dict().items()}

    def optim_state_dict(self) -> dict:
        optimizer = self.optim_wrapper.optimizer
        named = FSDP.optim_state_dict(self.model, optimizer)
        if not named:  # only rank 0 gets it, and writes
            return {}
        numbered = FSDP.rekey_optim_state_dict(named, OptimStateKeyType.PARAM_ID, self.model, optim=optimizer)
        return {**self.optim_wrapper.state_dict(), **numbered}

    def load_optim_state_dict(self, state_dict: dict) -> None:
        optimizer = self.optim_wrapper.optimizer
        named = FSDP.rekey_optim_state_dict(state_dict, OptimStateKeyType.PARAM_NAME, self.model, optim=optimizer)
        sharded = FSDP.optim_state_dict_to_load(self.model, optimizer, named)
        self.optim_wrapper.load_state_dict({**state_dict, **sharded})
