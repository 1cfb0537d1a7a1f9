"""Options of a training run besides its config."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainOptions:
    """Options of :func:`~mmseg_inceptionnext.training.train.train`; ``tools/train.py`` has a flag for each.

    Attributes:
        weights: Checkpoint of the backbone instead of the config's, see
            :func:`~mmseg_inceptionnext.models.weights.load_pretrained`; 'none' trains from scratch. For a classifier,
            backbone and head, see :func:`~mmseg_inceptionnext.models.weights.load_classifier`.
        resume: Path of the checkpoint to resume from, or True for the newest undamaged one in the work dir. Where there
            is none yet, the run starts from the beginning, so that a job script can always ask to resume.
        overwrite: Replace the checkpoints of another run in the work dir; by default they are an error.
        amp: Mixed precision, see :func:`~mmseg_inceptionnext.training.mixed_precision.amp_optim_wrapper`.
        seed: Seed of all random numbers. Default: the config's, on resuming the checkpoint's, else a random one.
        epochs, iters: Length of the run, in passes over the training images, or in iterations; warm-up, decay,
            checkpoints and validations follow. Default: the config's.
        finetune: Checkpoint of another segmentor to start from, see
            :func:`~mmseg_inceptionnext.models.weights.load_for_finetuning`.
        class_weights: 'auto' weighs the classes in the loss, see
            :func:`~mmseg_inceptionnext.data.class_weights.use_class_weights`.
        ema: Validate and save an exponential moving average of the weights.
        early_stop: Stop after so many validations without a better one.
        auto_batch: Accumulate gradients so that the recipe's batch holds, see
            :func:`~mmseg_inceptionnext.training.batch.split_recipe_batch`.
        skip_bad_images: Replace training images that cannot be read by others, instead of stopping.
        strategy: 'ddp': each rank holds the whole model; 'fsdp': each holds a shard of it, see
            :class:`~mmseg_inceptionnext.training.fsdp.ShardedStrategy`.
    """

    weights: str | None = None
    resume: str | bool = False
    overwrite: bool = False
    amp: bool = False
    seed: int | None = None
    epochs: int | None = None
    iters: int | None = None
    finetune: str | None = None
    class_weights: str | None = None
    ema: bool = False
    early_stop: int | None = None
    auto_batch: bool = False
    skip_bad_images: bool = False
    strategy: str = 'ddp'
