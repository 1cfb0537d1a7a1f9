"""Train a segmentor."""

import shlex
import sys

from mmengine.dist import is_main_process

from mmseg_inceptionnext.checkpoints.reading import trusting_checkpoints
from mmseg_inceptionnext.command_line import ToolParser, add_config_options, add_trust_option, command, run
from mmseg_inceptionnext.config import load_config
from mmseg_inceptionnext.training.options import TrainOptions
from mmseg_inceptionnext.training.train import plan, run_result, train


def main() -> None:
    parser = ToolParser('train', __doc__)
    parser.add_argument('config', help='config file')
    add_config_options(parser)
    parser.add_argument(
        '--weights', metavar='X|none', help='weights of the backbone: timm name, https URL, file, or none (the config)'
    )
    parser.add_argument(
        '--resume', nargs='?', const=True, default=False, metavar='CKPT', help='resume from CKPT (the last checkpoint)'
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision: bf16, or fp16 on GPUs without it')
    parser.add_argument('--seed', type=int, help='random seed')
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
    add_trust_option(parser)
    args = parser.parse_args()

    cfg = load_config(args.config, args.work_dir, args.data_root, args.launcher, args.cfg_options)
    options = TrainOptions(
        weights=args.weights, resume=args.resume, amp=args.amp, seed=args.seed, auto_batch=args.auto_batch,
        skip_bad_images=args.skip_bad_images, strategy=args.strategy,
    )  # fmt: skip
    with trusting_checkpoints(args.trust_checkpoint):
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
