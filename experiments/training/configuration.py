"""Typed configurations of trainings.

A file gives the fields of :class:`TrainingConfig`. The model is the name of a published configuration, or a whole
configuration, or a name with other values for some fields::

    model: {config: mdeq_cifar_tiny, dropout: 0.3}
    data: {name: cifar10}
    epochs: 50
    optimizer: {name: adam, lr: 0.001}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.training.config_files import SUFFIXES, config_path, parse_yaml, read_mapping
from pydeq.arguments import suggests_keywords
from pydeq.models import MODELS, config_from_mapping, load_config
from pydeq.models.configuration import Config, build_config, check_above_zero, check_at_least
from pydeq.models.equilibrium import PenaltyConfig


@suggests_keywords
@dataclass(frozen=True)
class DataConfig(Config):
    """The data of a training.

    Args:
        name: Name of a data set of :mod:`experiments.data` or of :mod:`experiments.training.synthetic`; imagenet or
            image_folder for folders of images; or the path of a text.
        root: Folder of the data, see :mod:`experiments.data`.
        augmentation: Of training images: none, a crop of the padded image, a flip, or both; for folders of images,
            none or random_resized.
        padding: Pixels on each side before the crop.
        size: Height and width of images from folders.
        workers: Number of processes that read images from folders.
        train_samples: Use only the first n training samples; all by default.
        test_samples: Use only the first n test samples; all by default.
        holdout: Number of training samples, drawn by the seed, to use for validation instead.
        length: Tokens of a segment of text.
        test_memory: Tokens remembered in evaluation; by default as many as in training.
        level: Cut a text into words or characters; see :func:`experiments.data.load_text`.
        vocabulary_size: Keep only the most frequent tokens of a text, this many; all by default.
        lowercase: Whether to convert a text to lower case first.
        row_normalized: Whether a node's features are scaled to the sum 1.
    """

    name: str
    root: str | None = None
    augmentation: Literal["none", "crop", "flip", "crop_flip", "random_resized"] = "none"
    padding: int = 4
    size: int = 224
    workers: int = 0
    train_samples: int | None = None
    test_samples: int | None = None
    holdout: int = 0
    length: int = 64
    test_memory: int | None = None
    level: Literal["word", "char"] = "word"
    vocabulary_size: int | None = None
    lowercase: bool = False
    row_normalized: bool = False

    def check(self) -> None:
        check_at_least(self, 1, "size", "train_samples", "test_samples", "length", "vocabulary_size")
        check_at_least(self, 0, "padding", "holdout", "test_memory", "workers")


@suggests_keywords
@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optimizer of a training.

    Args:
        name: Name of the optimizer; sgd has Nesterov momentum unless ``nesterov`` is false.
        lr: Peak learning rate, above 0.
        weight_decay: At least 0; decoupled for adamw, added to the gradient for adam and sgd.
        decay_vectors: Whether parameters of at most one dimension (biases and those of norms) decay, too.
        betas: Decay of the moments of adam and adamw, two numbers in [0, 1); see :class:`torch.optim.Adam`.
        eps: Added to the denominator of adam and adamw; see :class:`torch.optim.Adam`.
        momentum: Momentum of sgd, in [0, 1).
        nesterov: Whether the momentum of sgd is Nesterov's.
        clip: Largest norm of the gradient; None for no clipping.
    """

    name: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-3
    weight_decay: float = 0.0
    decay_vectors: bool = True
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9
    nesterov: bool = True
    clip: float | None = None

    def check(self) -> None:
        check_above_zero(self, "lr", "eps", "clip")
        check_at_least(self, 0, "weight_decay", "momentum")
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas must be two numbers in [0, 1), got {list(self.betas)}")
        if self.momentum >= 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


@suggests_keywords
@dataclass(frozen=True)
class ScheduleConfig(Config):
    """The schedule of the learning rate; see :func:`experiments.training.schedules.learning_rate`.

    Args:
        name: constant, or cosine, which falls to ``floor`` over all steps.
        warmup: Number of steps of a linear rise from 0.
        floor: The last learning rate, at least 0.
    """

    name: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    floor: float = 0.0

    def check(self) -> None:
        check_at_least(self, 0, "warmup", "floor")


@suggests_keywords
@dataclass(frozen=True)
class PretrainingConfig(Config):
    """Shallow pre-training: the first steps unroll a few applications of the cell.

    Args:
        steps: Number of such steps, at least 0.
        layers: Applications of the cell, at least 1.
    """

    steps: int = 0
    layers: int = 2

    def check(self) -> None:
        check_at_least(self, 0, "steps")
        check_at_least(self, 1, "layers")


@suggests_keywords
@dataclass(frozen=True)
class EvaluationConfig(Config):
    """The evaluations on validation data.

    Args:
        every_epochs: Epochs between two evaluations; 1 by default. The last step is always followed by an evaluation.
        every_steps: Steps between two evaluations, instead of ``every_epochs``.
        stops: Hard stops, in evaluations of f, at which the metric is measured, too.
        batch: Samples, or rows of text, at a time; by default as in training.
        samples: Use only the first n samples, or tokens of text; all by default.
        radius_samples: Number of samples whose spectral radius is estimated; 0 for none.
        radius_steps: Largest number of vector-Jacobian products of an estimate.
        radius_method: See :func:`pydeq.spectral_radius`.
    """

    every_epochs: int | None = None
    every_steps: int | None = None
    stops: tuple[int, ...] = ()
    batch: int | None = None
    samples: int | None = None
    radius_samples: int = 32
    radius_steps: int = 50
    radius_method: Literal["growth", "arnoldi"] = "growth"

    def check(self) -> None:
        check_at_least(self, 1, "every_epochs", "every_steps", "batch", "samples")
        check_at_least(self, 0, "radius_samples")
        check_at_least(self, 2, "radius_steps")
        if self.every_epochs is not None and self.every_steps is not None:
            raise ValueError("every_epochs and every_steps exclude each other")
        if any(stop < 1 for stop in self.stops) or len(set(self.stops)) < len(self.stops):
            raise ValueError(f"stops must be different numbers of at least 1, got {list(self.stops)}")


@suggests_keywords
@dataclass(frozen=True)
class CheckpointConfig(Config):
    """The checkpoints of a training.

    Args:
        every_steps: Steps between two checkpoints; by default one with each evaluation. The last step is always saved.
        keep: How many of the newest checkpoints to keep, at least 1. With two, one may be damaged.
    """

    every_steps: int | None = None
    keep: int = 2

    def check(self) -> None:
        check_at_least(self, 1, "every_steps", "keep")


@suggests_keywords
@dataclass(frozen=True)
class LoggingConfig(Config):
    """The logs of a training.

    Args:
        every_steps: Steps between two rows of means.
        tensorboard: Whether to write TensorBoard logs.
        plot: Whether to draw a plot after each evaluation and at the end.
    """

    every_steps: int = 50
    tensorboard: bool = False
    plot: bool = True

    def check(self) -> None:
        check_at_least(self, 1, "every_steps")


@dataclass(frozen=True)
class TrainingConfig(Config):
    """A training.

    Args:
        model: A model's configuration; also a name or a mapping, as in files.
        data: The data.
        epochs: Length of the training in epochs, at least 1; exactly one of ``epochs`` and ``steps``.
        steps: Length of the training in steps; 0 only evaluates. A step is one update of the parameters.
        batch: Samples, or rows of text, of a step, over all ranks and accumulated parts.
        accumulation: Number of parts that each rank processes one after the other in a step.
        optimizer: The optimizer.
        schedule: The schedule of its learning rate.
        pretraining: The first, shallow steps.
        jitter: [lo, hi]: a step's cap on evaluations is the model's max_steps plus a random whole number from lo to hi.
        penalty: The Jacobian penalty; by default the penalty in the model's configuration. Strength 0 means none.
        evaluation: The evaluations on validation data.
        checkpoint: The checkpoints.
        logging: The logs.
        seed: Seed of all random numbers.
        amp: Mixed precision: none, bf16, or fp16 with a scaled loss.
        strategy: How processes share the work: ddp, fsdp2, or none for one process.
        device: cpu, cuda, or auto for cuda if it is available.
    """

    model: Config
    data: DataConfig
    epochs: int | None = None
    steps: int | None = None
    batch: int = 64
    accumulation: int = 1
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    pretraining: PretrainingConfig = field(default_factory=PretrainingConfig)
    jitter: tuple[int, ...] = (0, 0)
    penalty: PenaltyConfig | None = None
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    seed: int = 0
    amp: Literal["none", "bf16", "fp16"] = "none"
    strategy: Literal["none", "ddp", "fsdp2"] = "none"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.model, str | Path | Mapping):
            object.__setattr__(self, "model", config_from_mapping(_model_mapping(self.model, None)))
        super().__post_init__()

    def check(self) -> None:
        if not any(type(self.model) is kind for kind, _ in MODELS.values()):
            raise TypeError(f"model must be the configuration of a model, got {type(self.model).__name__}")
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(f"there must be either epochs or steps, got {self.epochs} and {self.steps}")
        check_at_least(self, 0, "steps", "seed")
        check_at_least(self, 1, "epochs", "batch", "accumulation")
        if len(self.jitter) != 2 or self.jitter[0] > self.jitter[1]:
            raise ValueError(f"jitter must be a pair [lo, hi] with lo <= hi, got {list(self.jitter)}")
        if self.max_steps + self.jitter[0] < 1:
            raise ValueError(
                f"jitter must leave at least 1 evaluation of the model's max_steps {self.max_steps}, got"
                f" {list(self.jitter)}"
            )
        if self.batch % self.accumulation:
            raise ValueError(f"batch must be a multiple of accumulation, {self.accumulation}, got {self.batch}")
        if self.amp == "fp16" and self.strategy == "fsdp2":
            raise ValueError("amp must be none or bf16 with fsdp2: the scaled loss of fp16 needs whole gradients")

    @property
    def max_steps(self) -> int:
        """The cap on the model's forward evaluations in training."""
        return self.model.solver.max_steps  # pyright: ignore[reportAttributeAccessIssue]

    def jacobian_penalty(self) -> PenaltyConfig | None:
        """Return the penalty of this training: its own, or the penalty in the model's configuration."""
        return self.penalty if self.penalty is not None else getattr(self.model, "penalty", None)

    def mapping(self) -> dict[str, Any]:
        """Return the configuration in the form of a file: mappings, lists and scalars."""
        return _plain(self) | {"model": _mapping_of(self.model)}

    def with_values(self, values: Mapping[str, Any]) -> TrainingConfig:
        """Return a copy with other values.

            config.with_values({"model.solver.max_steps": 8, "penalty.strength": 0.5})

        Args:
            values: Values by the dotted path of a field. ``epochs`` replaces ``steps``, and ``steps`` replaces
                ``epochs``. If the training itself has no penalty, fields of ``penalty`` replace those of the
                model's penalty.

        Raises:
            TypeError, ValueError: If there is no such field, or a value is not valid.
        """
        return training_config_from_mapping(_with_values(self.mapping(), values))


def training_config_from_mapping(mapping: Mapping[str, Any], folder: Path | None = None) -> TrainingConfig:
    """Build a configuration from a mapping of its fields.

    Args:
        mapping: The content of a file.
        folder: Folder of the files that it names; the working folder by default.

    Raises:
        TypeError: If a key is unknown (the message gives the nearest name) or missing, or a value has another type.
        ValueError: If a value is out of range.
    """
    mapping = dict(mapping)
    if "model" in mapping and not isinstance(mapping["model"], Config):
        mapping["model"] = config_from_mapping(_model_mapping(mapping["model"], folder))
    return build_config(TrainingConfig, mapping)


def load_training_config(name: str | Path, values: Mapping[str, Any] | None = None) -> TrainingConfig:
    """Read a configuration.

    Args:
        name: One of :func:`training_config_names`, or the path of a .yaml or .json file.
        values: Other values for some fields, see :meth:`TrainingConfig.with_values`.

    Raises:
        ModuleNotFoundError: If a YAML file is read without PyYAML.
        TypeError, ValueError: If the configuration is not valid; the message names the file, or the value as an option
            ``--set`` of the command line, and the error.
    """
    path = config_path(name)
    mapping = read_mapping(path)
    values = values or {}
    try:
        if "model" in mapping:
            mapping["model"] = _model_mapping(mapping["model"], path.parent)
        return training_config_from_mapping(_with_values(mapping, values))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{_source_of(error, path, mapping, values)}: {error}") from error


def _source_of(error: Exception, path: Path, mapping: Mapping[str, Any], values: Mapping[str, Any]) -> str:
    """The file of a configuration, or the first of the values on top of it that leads to the error."""
    for count in range(len(values) + 1):
        try:
            training_config_from_mapping(_with_values(mapping, dict(list(values.items())[:count])))
        except (OSError, TypeError, ValueError) as found:
            if str(found) == str(error):
                return f"--set {list(values)[count - 1]}" if count else str(path)
    return str(path)


def parse_values(assignments: Sequence[str]) -> dict[str, Any]:
    """Parse texts ``key=value``, with the values in YAML.

    Raises:
        ValueError: If a text has no ``=`` or no key, or a value is not valid YAML.
    """
    values = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ValueError(f"a value must be set as key=value, got {assignment!r}")
        try:
            values[key] = parse_yaml(text)
        except ValueError as error:
            raise ValueError(f"the value of {key} is {error}") from error
    return values


def _model_mapping(model: Any, folder: Path | None) -> dict[str, Any]:
    """Return a model's whole mapping: ``config`` names a configuration, and the other keys replace its values."""
    if isinstance(model, str | Path):
        model = {"config": str(model)}
    if not isinstance(model, Mapping):
        raise TypeError(f"model must be the name of a configuration or a mapping, got {model!r}")
    mapping = dict(model)
    if "config" in mapping:
        name = mapping.pop("config")
        if not isinstance(name, str):
            raise TypeError(f"model.config must be the name of a configuration, got {name!r}")
        if name.endswith(SUFFIXES):
            base = read_mapping(config_path((folder or Path()) / name))
        else:
            base = _mapping_of(load_config(name))
        mapping = _merged(base, mapping)
    return mapping


def _merged(base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``base`` with its values replaced by ``values``; mappings are merged."""
    result = dict(base)
    for key, value in values.items():
        old = result.get(key)
        result[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _with_values(mapping: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``mapping`` with other values at dotted paths."""
    result = _merged(mapping, {})
    for path, value in values.items():
        *parents, last = path.split(".")
        if parents[:1] == ["penalty"] and result.get("penalty") is None and isinstance(result.get("model"), Mapping):
            # The training uses the model's penalty: keep its other fields.
            result["penalty"] = result["model"].get("penalty")
        place = result
        for i, name in enumerate(parents):
            inner = place.get(name)
            if inner is None:
                inner = {}
            elif not isinstance(inner, Mapping):
                raise ValueError(f"{path} names no field: {'.'.join(parents[: i + 1])} has no fields")
            place[name] = dict(inner)
            place = place[name]
        place[last] = value
        if path in ("epochs", "steps") and value is not None:
            result["steps" if path == "epochs" else "epochs"] = None
    return result


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return value


def _mapping_of(model: Config) -> dict[str, Any]:
    """Return a model's configuration as a file holds it."""
    (kind,) = (name for name, (config, _) in MODELS.items() if type(model) is config)
    return {"model": kind} | _plain(model)
