"""The options of train_enwik8.py, and the presets that fill in what is left out."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.tracking import get_available_trackers
from command_line import UsageError, flag, judge

Weighting = Literal['token', 'sequence', 'square', 'padded', 'sequence_sum']
NAMES: dict[Any, str] = {0.0: 'token', 0.5: 'square', 1.0: 'sequence'}  # of the powers p that have one
HEAD = 64  # the width of one, as x-transformers has it; a single head is not projected back

# base is x-transformers' own train_enwik8.py
PRESETS: dict[str, dict[str, Any]] = {
    'tiny': {
        'dim': 128, 'depth': 3, 'heads': 2, 'orthog_values': False,
        'seq_len': 256, 'batch_size': 32, 'grad_accum': 1, 'learning_rate': 2e-3,
        'steps': 400, 'validate_every': 100, 'generate_every': 400, 'generate_length': 128,
    },
    'base': {
        'dim': 512, 'depth': 6, 'heads': 8, 'orthog_values': True,
        'seq_len': 1024, 'batch_size': 4, 'grad_accum': 4, 'learning_rate': 1e-4,
        'steps': 100_000, 'validate_every': 100, 'generate_every': 500, 'generate_length': 1024,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """Train a byte-level decoder on real text; what it costs at each length goes to runs/NAME.

    What is left at None from `dim` to `generate_length` is set by the preset: tiny takes about two minutes on a core.
    """

    data: str = 'auto'
    """'auto': data/enwik8, .gz or .zip, else a download of it, else 'builtin'; 'builtin': the documentation inside
    Python; or the path of a raw, .gz or .zip file."""
    max_bytes: int | None = None
    """Read no more of the text than this."""
    sequences: Literal['lines', 'pages', 'windows', 'mixed', 'sums'] = 'lines'
    """'lines': each distinct non-blank line; 'pages': each <page>, both as long as they are, up to seq_len + 1 bytes;
    'windows': random crops of seq_len + 1 bytes; 'mixed': one to one, long lines, and titles of articles in other
    languages, of which the code of the language is to be learned; 'sums': of two numbers of 1 to 12 digits, of which
    the answer is to be learned, made without a text."""
    held_out: int = 1024
    """Validate on at most so many sequences, and on all answers beside them. None of their lines occurs in training."""

    equal_loss_weight_batch: bool = False
    """Every sequence weighs the same in the loss, however long: loss_weighting 'sequence'."""
    loss_weighting: Weighting | float | None = None
    """A weighting by name, or p in [0, 1]: a byte of a sequence of L targets weighs L^-p. None: 'token'."""

    preset: Literal['auto', 'tiny', 'base'] = 'auto'
    """'tiny': minutes on a CPU; 'base': the settings of x-transformers' train_enwik8.py; 'auto': by device."""
    dim: int | None = None
    depth: int | None = None
    heads: int | None = None
    orthog_values: bool | None = None
    """x-transformers' attn_orthog_projected_values, which base has."""
    seq_len: int | None = None
    """The most positions the network sees."""
    batch_size: int | None = None
    """Sequences in a micro-batch, of all processes together: how many there are changes the speed alone."""
    grad_accum: int | None = None
    """Micro-batches in an optimizer step."""
    layout: Literal['padded', 'packed'] = 'padded'
    """'padded': a row for each sequence; 'packed': several sequences in each row, kept apart. The loss is the same."""
    unpad: bool = False
    """Of padded rows, compute the real bytes alone: packed on the way where that is quicker. The loss is the same."""
    learning_rate: float | None = None
    warmup_steps: int = 0
    """The learning rate rises over so many steps."""
    decay: Literal['none', 'cosine', 'linear'] = 'none'
    """How the learning rate falls to zero by the last step."""
    steps: int | None = None
    """Optimizer steps."""
    until_flat: float | None = None
    """End before --steps where bits per byte fall by less than this for every 100 steps, over the second half of the
    reports so far. The learning rate stays up until then; --decay takes a last fifth of the steps."""
    validate_every: int | None = None
    generate_every: int | None = None
    generate_length: int | None = None

    checkpoint_every: int | None = None
    """Steps from one checkpoint to the next. There is one at the end, and after Ctrl-C or SIGTERM, in any case."""
    resume: bool = False
    """Go on from the last checkpoint of the run of this name; start afresh where there is none."""
    tracker: Literal['none', 'tensorboard', 'wandb'] = 'none'
    """Where the metrics go beside runs/NAME/metrics.jsonl."""
    compile: bool = False
    """Compile the model with torch.compile."""
    threads: int | None = None
    """Of the CPU. None: as many as torch takes by itself."""
    seed: int = 0
    """Of the parameters, the batches and the samples; the batches are the same for every weighting."""
    name: str | None = None
    """The results go to runs/NAME, over those of an earlier run. None: the data, the sequences, the weighting,
    and the layout where it is not padded."""

    config: str | None = None
    """Start from the options in this file, a run's config.json or YAML; those on the command line come after it.
    The name of the run is among them."""
    generate_from: str | None = None
    """Train nothing: draw a continuation of --prompt from the last checkpoint of a run, runs/NAME."""
    prompt: str | None = None
    """The beginning of a text."""


FOR_ONE_CALL = ('resume', 'config', 'generate_from', 'prompt')  # no part of a run
# what a run may go on with otherwise than it began: its steps end later, and are as they were
CHANGEABLE = (
    *FOR_ONE_CALL, 'preset', 'steps', 'validate_every', 'generate_every', 'generate_length', 'checkpoint_every',
    'tracker', 'compile', 'threads', 'name',
)  # fmt: skip


def resolve(config: Config, device: torch.device) -> Config:
    """Fill in what was left out, by the preset for this device. Raises `UsageError`."""
    preset = config.preset if config.preset != 'auto' else 'tiny' if device.type == 'cpu' else 'base'
    chosen = {name: value for name, value in asdict(config).items() if value is not None}
    config = Config(**(PRESETS[preset] | chosen | {'preset': preset}))
    judge(config)
    if config.prompt is not None:
        raise UsageError('--prompt goes with --generate-from')
    if config.heads == 1 and config.dim != HEAD:
        raise UsageError(f'--heads 1 goes with --dim {HEAD}, the width of a head, got {config.dim}')
    for option, is_on in {'--layout packed': config.layout == 'packed', '--unpad': config.unpad}.items():
        if is_on and config.orthog_values:
            raise UsageError(f'{option} goes with --orthog-values False: those mix the sequences of a row')
    return config


def check_tracker(tracker: str) -> None:
    """Check that the package of a tracker is there. Raises `UsageError`."""
    if tracker not in ('none', *map(str, get_available_trackers())):
        raise UsageError(f'--tracker {tracker} wants its package: pip install {tracker}')


def of_run(config: Config) -> dict[str, Any]:
    """Return what a run's config.json holds."""
    return {name: value for name, value in asdict(config).items() if name not in FOR_ONE_CALL}


def check_resumed(config: Config, before: Config, folder: Path) -> None:
    """Check that a run goes on as it began. Raises `UsageError`."""
    for field, value in asdict(config).items():
        began = getattr(before, field)
        is_fixed = field not in CHANGEABLE or (field == 'steps' and config.decay != 'none')
        if is_fixed and value != began:
            advice = f'--config {folder / "config.json"} has its options'
            raise UsageError(f'--resume: {folder} began with {flag(field)} {began}, not {value}: {advice}')


def run_name(config: Config, source: str) -> str:
    """Name a run by its data, sequences, weighting and, where it is not padded, layout: builtin-lines-token."""
    weighting = 'sequence' if config.equal_loss_weight_batch else config.loss_weighting or 0.0
    weighting = NAMES.get(weighting, weighting)
    layout = '-packed' if config.layout == 'packed' else '-unpad' if config.unpad else ''
    return f'{Path(source).name.partition(".")[0]}-{config.sequences}-{weighting}{layout}'
