"""The recipes of the trainings of each profile, for images and for language.

paper: the published configurations, unchanged.
cpu: CIFAR-10 and Shakespeare at sizes that two cores train. Solvers and tolerances are the published ones, and so are
the caps of the image models; the small language model has smaller caps. Penalties were chosen on validation data;
the penalty of images is computed in every step, because the published frequencies are for trainings that are a hundred
times longer.
cpu-long: the same, longer and with a stem that sees every pixel: twelve epochs of CIFAR-10 with augmentation, and 8000
steps of Shakespeare. Image models may train in bfloat16, which takes half the time where the CPU has it. The language
models keep their size and float32, which is as fast at this size. The images are penalized from the first step on.
Where the penalty began after the pre-training, the radius had grown beyond 1 before, and the accuracy at a hard stop of
6 was 1.2 points lower (pilots with seed 0). There, a strength of 0.3 was worse than 1.
smoke: digits and a computed text, to check that everything runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from experiments.paper.measurement import Training
from experiments.training import TrainingConfig, load_training_config, training_config_from_mapping
from pydeq.jacobian.estimator import Mode
from pydeq.models.equilibrium import PenaltyConfig

Precision = Literal["none", "bf16"]

PLAIN, PENALIZED, DECAY = "unpenalized", "penalized", "weight decay"
PLAIN_SMALL, PLAIN_GENEROUS = "unpenalized, small cap", "unpenalized, generous cap"
PENALIZED_SMALL, PENALIZED_GENEROUS = "penalized, small cap", "penalized, generous cap"
SMALLEST = "post-LN, smallest cap"


@dataclass(frozen=True)
class ImageRecipes:
    """The trainings of the image experiments.

    Args:
        plain: The unpenalized model, with a generous cap as published.
        penalized: The penalized model, with a small cap as published.
        strengths: The strengths to compare, rising.
        stop: The hard stop at which models are compared.
        stops: All hard stops to test, ``stop`` among them.
        test_batch: Images at a time in tests.
    """

    plain: TrainingConfig
    penalized: TrainingConfig
    strengths: tuple[float, ...]
    stop: int
    stops: tuple[int, ...]
    test_batch: int

    def training(
        self,
        *,
        cap: str = "small",
        strength: float | None = None,
        mode: Mode | None = None,
        weight_decay: float | None = None,
        seed: int = 0,
    ) -> Training:
        """Make a training of the grid.

        Args:
            cap: "small" for the cap of the penalized recipe, "generous" for the cap of the unpenalized one.
            strength: Strength of the penalty; None for the recipe's strength, 0 for no penalty. The strength during
                pre-training follows.
            mode: Mode of the penalty; None for the recipe's mode.
            weight_decay: By default the recipe's weight decay.
            seed: Seed of the training.
        """
        if cap == "generous" and strength == 0.0 and weight_decay is None:
            return self._training(self.plain, seed)  # the published one
        config = self.penalized
        penalty = published_penalty(config)
        if strength is not None:
            ratio = strength / penalty.strength
            scaled = replace(penalty, strength=strength, pretraining_strength=ratio * penalty.pretraining_strength)
            penalty = scaled if strength else PenaltyConfig(0.0)
        if mode is not None:
            penalty = replace(penalty, mode=mode)
        if cap == "generous":
            config = capped(config, *caps(self.plain))
            config = replace(config, jitter=self.plain.jitter)
        if weight_decay is not None:
            config = config.with_values({"optimizer.weight_decay": weight_decay})
        # A strength equal to the recipe's must give the same training as None.
        if penalty != published_penalty(config):
            config = replace(config, penalty=penalty)
        return self._training(config, seed)

    def _training(self, config: TrainingConfig, seed: int) -> Training:
        return Training(replace(config, seed=seed), self.stops, self.test_batch)


@dataclass(frozen=True)
class LanguageRecipes:
    """The trainings of the language experiment.

    Args:
        models: Trainings by the names of :data:`experiments.paper.published.TABLE1`.
        stop: The hard stop at which unpenalized models are tested, too.
        stops: All hard stops to test.
        test_batch: Rows of text at a time in tests.
    """

    models: Mapping[str, TrainingConfig]
    stop: int
    stops: tuple[int, ...]
    test_batch: int

    def training(self, model: str, seed: int = 0) -> Training:
        """Make a training of the grid."""
        return Training(replace(self.models[model], seed=seed), self.stops, self.test_batch)


@dataclass(frozen=True)
class Recipes:
    """The trainings of a profile.

    Args:
        name: cpu, cpu-long, paper or smoke.
        seeds: Number of seeds of the main rows of the image experiments.
        images: Trainings of the image experiments.
        language: Trainings of the language experiment.
        figure7: Trainings of figure 7 by the names below, at least the first three.
        figure8: Trainings of figure 8: :data:`PLAIN`, :data:`PENALIZED`, and names that begin with :data:`DECAY`.
        figure8_stop: The hard stop at which they are compared.
        lengths: Trainings of different length for the experiment "length", by their epochs.
        needs_gpu: Whether the trainings need a GPU.
        imagenet: ImageNet trainings of table 2 by the names of :data:`experiments.paper.published.TABLE2`: pairs of the
            unpenalized and the penalized one.
    """

    name: str
    seeds: int
    images: ImageRecipes
    language: LanguageRecipes
    figure7: Mapping[str, Training]
    figure8: Mapping[str, Training]
    figure8_stop: int
    lengths: Mapping[int, Training]
    needs_gpu: bool = False
    imagenet: Mapping[str, tuple[Training, Training]] | None = None


def caps(config: TrainingConfig) -> tuple[int, int]:
    """Return the caps on evaluations, forward and backward."""
    solver: Any = config.model.solver  # pyright: ignore[reportAttributeAccessIssue]
    return solver.max_steps, solver.backward_max_steps


def capped(config: TrainingConfig, forward: int, backward: int) -> TrainingConfig:
    """Return a training with other caps."""
    return config.with_values({"model.solver.max_steps": forward, "model.solver.backward_max_steps": backward})


def published_penalty(config: TrainingConfig) -> PenaltyConfig:
    """Return the penalty of a recipe that has one."""
    penalty = config.jacobian_penalty()
    if penalty is None:
        raise ValueError("config must have a penalty, got none")
    return penalty


def recipes_of(profile: str, device: str = "auto", imagenet: str | None = None, amp: Precision = "none") -> Recipes:
    """Return the recipes of a profile.

    Args:
        profile: cpu, cpu-long, paper or smoke.
        device: auto, cpu or cuda.
        imagenet: Folder of ImageNet, for table 2 of the paper profile.
        amp: Mixed precision of the image trainings of cpu-long: none or bf16.

    Raises:
        ValueError: If there is no such profile, or it has no choice of the precision.
    """
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    if amp != "none" and profile != "cpu-long":
        raise ValueError(f"amp must be none with profile {profile}: only cpu-long has a choice, got {amp!r}")
    return PROFILES[profile]({"device": device, "logging.plot": False, "logging.tensorboard": False}, imagenet, amp)


def _smoke(common: dict[str, Any], imagenet: str | None, amp: Precision) -> Recipes:
    solver = {
        "forward": "broyden", "backward": "broyden", "rtol": 1e-3, "max_steps": 4,
        "backward_rtol": 1e-4, "backward_max_steps": 3,
    }  # fmt: skip
    penalized = _config(common, {
        "model": {
            "model": "conv_deq", "image_channels": 1, "classes": 10, "channels": 8, "inner": 8, "groups": 4,
            "stride": 2, "solver": solver,
        },
        "data": {"name": "digits", "test_samples": 100},
        "steps": 12, "batch": 32,
        "optimizer": {"lr": 0.01},
        "penalty": {"strength": 0.5, "frequency": 0.5},
        "evaluation": {"every_steps": 3, "batch": 100, "samples": 50, "radius_samples": 4, "radius_steps": 10},
    })  # fmt: skip
    plain = replace(capped(penalized, 6, 6), penalty=None)
    images = ImageRecipes(plain, penalized, (0.1, 0.5, 2.0), stop=3, stops=(1, 2, 3), test_batch=100)
    post = _config(common, {
        "model": {
            "model": "deq_transformer_lm", "vocabulary": 16, "d_model": 16, "d_inner": 16, "heads": 2, "d_head": 8,
            "memory_length": 8, "init_std": 0.1, "solver": solver | {"forward": "anderson"},
        },
        "data": {"name": "synthetic_text", "length": 16},
        "steps": 8, "batch": 8,
        "optimizer": {"lr": 0.01, "clip": 0.25},
        "pretraining": {"steps": 2, "layers": 2},
        "penalty": {"strength": 1.0, "frequency": 0.5},
        "evaluation": {"every_steps": 4, "batch": 8, "samples": 256, "radius_samples": 2, "radius_steps": 10},
    })  # fmt: skip
    language = LanguageRecipes(_language_models(post, (6, 6), (4, 3)), 3, (3,), 8)
    return Recipes(
        "smoke", 1, images, language, _four(images), _decayed(images, (1e-3,)), images.stop,
        _lengths(common, (1, 2), {"data.train_samples": 128, "data.test_samples": 100}),
    )  # fmt: skip


def _cpu(common: dict[str, Any], imagenet: str | None, amp: Precision) -> Recipes:
    return _on_two_cores("cpu", common, 2, (0.3, 1.0, 3.0, 10.0), {}, {})


def _cpu_long(common: dict[str, Any], imagenet: str | None, amp: Precision) -> Recipes:
    images = {
        "model.channels": 64, "model.stem_channels": [64], "data.augmentation": "crop_flip", "steps": 9000,
        "amp": amp, "evaluation.every_steps": 375,
        "pretraining.steps": 750, "penalty.strength": 1.0, "penalty.pretraining_strength": 1.0,
    }  # fmt: skip
    language = {"steps": 8000, "schedule.warmup": 200, "pretraining.steps": 400, "evaluation.every_steps": 400}
    return _on_two_cores("cpu-long", common, 3, (0.1, 0.3, 1.0, 3.0, 10.0), images, language)


def _on_two_cores(
    name: str,
    common: dict[str, Any],
    seeds: int,
    strengths: tuple[float, ...],
    image_values: Mapping[str, Any],
    language_values: Mapping[str, Any],
) -> Recipes:
    """Make the trainings that two cores can do; those of the profile cpu but for the given values."""
    penalized = _config(common, {
        "model": {
            "model": "conv_deq", "image_channels": 3, "classes": 10, "channels": 48, "inner": 64, "stride": 4,
            "solver": {
                "forward": "broyden", "backward": "broyden", "rtol": 1e-3, "max_steps": 8,
                "backward_rtol": 1e-4, "backward_max_steps": 7,
            },
        },
        "data": {"name": "cifar10", "augmentation": "flip", "holdout": 2000},
        "steps": 1600, "batch": 64,
        "optimizer": {"name": "adam", "lr": 0.003},
        "schedule": {"name": "cosine"},
        "pretraining": {"steps": 160, "layers": 8},
        "jitter": [-2, 1],
        "penalty": {"strength": 3.0, "frequency": 1.0},
        "evaluation": {"every_steps": 80, "batch": 250, "samples": 500, "radius_samples": 32},
    }).with_values(image_values)  # fmt: skip
    plain = capped(penalized, 18, 20).with_values({"penalty": None, "jitter": [0, 0], "pretraining.layers": 10})
    images = ImageRecipes(
        plain, penalized, strengths, stop=6, stops=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 18), test_batch=250
    )
    post = _config(common, {
        "model": {
            "model": "deq_transformer_lm", "vocabulary": 128, "d_model": 64, "d_inner": 256, "heads": 4, "d_head": 16,
            "memory_length": 32, "window": 64, "dropout": 0.05, "init_std": 0.02,
            "solver": {
                "forward": "anderson", "backward": "broyden", "memory": 6, "rtol": 1e-3, "max_steps": 8,
                "backward_rtol": 1e-4, "backward_max_steps": 9,
            },
        },
        "data": {"name": "shakespeare", "level": "char", "length": 32},
        "steps": 1000, "batch": 32,
        "optimizer": {"name": "adam", "lr": 0.003, "clip": 0.25},
        "schedule": {"name": "cosine", "warmup": 50},
        "pretraining": {"steps": 100, "layers": 2},
        "penalty": {"strength": 0.1, "frequency": 0.35},
        "evaluation": {"every_steps": 100, "batch": 32, "samples": 16384, "radius_samples": 8},
    }).with_values(language_values)  # fmt: skip
    language = LanguageRecipes(_language_models(post, (30, 35), (8, 9)), 8, (3, 6, 8, 12), 64)
    return Recipes(
        name, seeds, images, language, _four(images), _decayed(images, (1e-4, 1e-3)), images.stop,
        _lengths(common, (8, 32)),
    )  # fmt: skip


def _paper(common: dict[str, Any], imagenet: str | None, amp: Precision) -> Recipes:
    def published(name: str, values: Mapping[str, Any] | None = None) -> TrainingConfig:
        return load_training_config(name, common | {"evaluation.stops": []} | dict(values or {}))

    images = ImageRecipes(
        published("mdeq_cifar_large"), published("mdeq_cifar_large_reg"), (0.1, 0.6, 1.2), stop=6,
        stops=(1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 17), test_batch=500,
    )  # fmt: skip
    post, post_penalized, pre_penalized = (
        published(f"deq_transformer_wt103_{name}") for name in ("post_ln", "post_ln_reg", "pre_ln_reg")
    )
    models = {
        "post-LN": post,
        "post-LN, smaller cap": capped(post, 20, 20),
        SMALLEST: capped(post, 15, 15),
        "pre-LN": post.with_values({"model.pre_norm": True}),
        "post-LN, penalized": post_penalized,
        "pre-LN, penalized": pre_penalized,
    }
    pairs = None
    if imagenet is not None:
        root = {"data.root": imagenet}
        pairs = {
            f"ImageNet, {size}": (
                Training(published(f"mdeq_imagenet_{size}", root), (14,), 128),
                Training(published(f"mdeq_imagenet_{size}_reg", root), (7, 14), 128),
            )
            for size in ("small", "large")
        }
    language = LanguageRecipes(models, 12, (12,), 10)
    # At these caps the paper shows the radius of language models.
    small, generous = (Training(capped(post, cap, cap), language.stops, language.test_batch) for cap in (16, 30))
    penalized, decayed = (
        language.training("post-LN, penalized"),
        small.config.with_values({"optimizer.weight_decay": 1e-6}),
    )
    figure7 = {PLAIN_SMALL: small, PLAIN_GENEROUS: generous, PENALIZED_SMALL: penalized}
    figure8 = {PLAIN: small, f"{DECAY} 1e-06": replace(small, config=decayed), PENALIZED: penalized}
    lengths = _lengths(common, (8, 32))
    return Recipes("paper", 1, images, language, figure7, figure8, 12, lengths, needs_gpu=True, imagenet=pairs)


def _four(images: ImageRecipes) -> dict[str, Training]:
    """Make figure 7's trainings from those of images."""
    return {
        PLAIN_SMALL: images.training(strength=0.0), PLAIN_GENEROUS: images.training(cap="generous", strength=0.0),
        PENALIZED_SMALL: images.training(), PENALIZED_GENEROUS: images.training(cap="generous"),
    }  # fmt: skip


def _decayed(images: ImageRecipes, decays: tuple[float, ...]) -> dict[str, Training]:
    """Make figure 8's trainings from those of images, all at the small cap."""
    decayed = {f"{DECAY} {decay:g}": images.training(strength=0.0, weight_decay=decay) for decay in decays}
    return {PLAIN: images.training(strength=0.0)} | decayed | {PENALIZED: images.training()}


def _lengths(
    common: Mapping[str, Any], epochs: Iterable[int], values: Mapping[str, Any] | None = None
) -> dict[int, Training]:
    """Make the same training on digits in different lengths."""
    stops = (1, 2, 3, 4, 5, 6, 8, 12, 20)
    config = _config(common, {
        "model": {
            "model": "conv_deq", "image_channels": 1, "classes": 10, "channels": 16, "inner": 16, "groups": 4,
            "solver": {
                "memory": 6, "backward_memory": 6, "rtol": 1e-3, "max_steps": 20,
                "backward_rtol": 1e-3, "backward_max_steps": 15,
            },
        },
        "data": {"name": "digits"},
        "epochs": 8, "batch": 64,
        "optimizer": {"name": "adam", "lr": 0.02},
        "schedule": {"name": "cosine"},
        "penalty": {"strength": 0.5, "frequency": 1.0},
        "evaluation": {"batch": 360, "radius_samples": 32, "every_epochs": 8},
    }).with_values(values or {})  # fmt: skip
    return {count: Training(config.with_values({"epochs": count}), stops, 360) for count in epochs}


def _language_models(
    penalized: TrainingConfig, generous: tuple[int, int], pre_caps: tuple[int, int]
) -> dict[str, TrainingConfig]:
    """Make the trainings of post-LN and pre-LN, with and without a penalty, and of post-LN without one at its cap.

    Args:
        penalized: Post-LN with a penalty.
        generous: Caps without a penalty, forward and backward.
        pre_caps: Caps of pre-LN with a penalty.
    """
    plain = replace(capped(penalized, *generous), penalty=None, jitter=(0, 0))
    return {
        "post-LN": plain,
        SMALLEST: capped(plain, *caps(penalized)),
        "pre-LN": plain.with_values({"model.pre_norm": True}),
        "post-LN, penalized": penalized,
        "pre-LN, penalized": capped(penalized, *pre_caps).with_values({"model.pre_norm": True}),
    }


def _config(common: Mapping[str, Any], mapping: Mapping[str, Any]) -> TrainingConfig:
    return training_config_from_mapping(mapping).with_values(common)


PROFILES = {"cpu": _cpu, "cpu-long": _cpu_long, "paper": _paper, "smoke": _smoke}
