"""Train a segmentor, or an ImageNet classifier."""

import argparse
import dataclasses
import shlex
import sys

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import (
    ToolParser,
    add_config_options,
    add_device_option,
    add_trust_option,
    add_verbose_option,
    command,
    positive_int,
    run,
)
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.console import quiet_screen
from mmseg_inceptionnext.device import use_device
from mmseg_inceptionnext.distributed import is_main_process
from mmseg_inceptionnext.measure.tables import recipes_table
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import plan, run_result, train


def main() -> None:
    parser = ToolParser('train', __doc__)
    parser.add_argument('config', nargs='?', help='config file, or the name of a shipped one')
    parser.add_argument('--list', action='store_true', help='list the shipped configs, and do nothing else')
    add_config_options(parser)
    parser.add_argument(
        '--weights',
        metavar='X|none',
        help='weights of backbone or classifier: timm name, https URL, file, or none (the config)',
    )
    parser.add_argument(
        '--resume', nargs='?', const=True, default=False, metavar='CKPT', help='resume from CKPT (the last checkpoint)'
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace the checkpoints of another run in the work dir'
    )
    parser.add_argument('--finetune', metavar='CKPT', help='start from another trained segmentor, whatever its classes')
    parser.add_argument('--amp', action='store_true', help='mixed precision: bf16, or fp16 on GPUs without it')
    parser.add_argument('--seed', type=int, help='random seed')
    length = parser.add_mutually_exclusive_group()
    length.add_argument('--epochs', type=positive_int, metavar='N', help='passes over the training images (the config)')
    length.add_argument(
        '--iters', type=positive_int, metavar='N', help='iterations; warm-up, checkpoints and validations follow'
    )
    parser.add_argument(
        '--class-weights',
        choices=('auto',),
        help='weigh rare classes more in the loss: by the inverse root of their pixels',
    )
    parser.add_argument('--ema', action='store_true', help='validate and save a moving average of the weights')
    parser.add_argument(
        '--early-stop', type=positive_int, metavar='N', help='stop after N validations without a better one'
    )
    parser.add_argument(
        '--auto-batch', action='store_true', help="accumulate gradients so that the recipe's effective batch holds"
    )
    parser.add_argument(
        '--dry-run', action='store_true', help='build everything, try two iterations, print the schedule and its cost'
    )
    parser.add_argument(
        '--skip-bad-images', action='store_true', help='replace training images that cannot be read, and count them'
    )
    parser.add_argument(
        '--strategy',
        choices=('ddp', 'fsdp'),
        default='ddp',
        help='each process holds the whole model (ddp), or a share of weights, gradients and optimizer',
    )
    add_device_option(parser)
    add_verbose_option(parser)
    add_trust_option(parser)
    args = parser.parse_args()
    if args.list:
        print(recipes_table())
        return
    if args.config is None:
        parser.error('the following arguments are required: config')
    with quiet_screen(not args.verbose), trusting_checkpoints(args.trust_checkpoint):
        execute(args)


def execute(args: argparse.Namespace) -> None:
    use_device(args.device, args.launcher)
    cfg = load_config(args.config, args.work_dir, args.data_root, args.launcher, args.cfg_options, args.data)
    options = TrainOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(TrainOptions)})
    if args.dry_run:
        resolved = plan(cfg, options)
        if is_main_process():
            print(resolved)
        return
    runner = train(cfg, options)
    if is_main_process():
        next_command = (
            command_to_resume(sys.orig_argv[1:]) if args.launcher == 'none' else 'the same command with --resume'
        )
        report(run_result(runner), next_command)


def report(result: dict, next_command: str) -> None:
    for iteration, reason in result['failed_validations'].items():
        print(f'warning: no validation at iteration {iteration}: {reason.strip().splitlines()[-1]}', file=sys.stderr)
    for image, times in result['skipped'].items():
        print(f'warning: replaced {times} times: {image}', file=sys.stderr)
    if result['skipped']:
        print(f'{len(result["skipped"])} training images cannot be read; others replaced them.')
    if result['stopped_by']:
        print(f'Stopped by {result["stopped_by"]} after iteration {result["done"]}. Go on: {next_command}')
        return
    figure = f'{result["metric"]} {result["best"]:.2f} at iteration' if result['best'] is not None else 'Last iteration'
    test = f'{command("test")} {shlex.join([str(result["config"]), str(result["checkpoint"])])}'
    print(f'{figure} {result["iteration"]}. Test it: {test}')


def command_to_resume(arguments: list[str]) -> str:
    """Return the same command with --resume, without the checkpoint that it may have named."""
    kept = [
        argument
        for before, argument in zip(['', *arguments], arguments, strict=False)
        if not argument.startswith('--resume') and (before != '--resume' or argument.startswith('-'))
    ]
    return shlex.join(['python', *kept, '--resume'])


if __name__ == '__main__':
    run(main)
