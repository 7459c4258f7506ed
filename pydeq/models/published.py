"""The published configurations, by name: MDEQ on images and the DEQ-Transformer on text.

Parameter counts are counted in the built models. Entries of the state are per image, 32 x 32 on CIFAR-10 and 224 x 224
on ImageNet.

Sources: Bai, Kolter and Koltun, Deep Equilibrium Models, NeurIPS 2019; Bai, Koltun and Kolter, Multiscale Deep
Equilibrium Models, NeurIPS 2020; the same, Stabilizing Equilibrium Models by Jacobian Regularization, ICML 2021.
"""

from __future__ import annotations

from dataclasses import replace

from pydeq.models.configuration import Config
from pydeq.models.equilibrium import PenaltyConfig, SolverConfig
from pydeq.models.mdeq import ClassificationConfig, MDEQConfig, SegmentationConfig
from pydeq.models.transformer import DEQTransformerConfig

# MDEQ. The first configuration of a data set has the values that its other configurations share.
_BROYDEN = SolverConfig(forward="broyden", backward="broyden", backward_rtol=1e-4)
_CIFAR_SOLVER = replace(_BROYDEN, rtol=1e-3, max_steps=18, backward_max_steps=20)
_IMAGENET_SOLVER = replace(_BROYDEN, rtol=0.0, atol=1e-3, max_steps=26, backward_max_steps=27)
_IMAGENET_REG_SOLVER = replace(_IMAGENET_SOLVER, max_steps=14, backward_max_steps=14)
_CITYSCAPES_SOLVER = replace(_IMAGENET_SOLVER, max_steps=27, backward_max_steps=30)

# CIFAR-10, 11.10M parameters, 61,440 entries of state.
_CIFAR_LARGE = MDEQConfig(
    channels=(32, 64, 128, 256),
    classification=ClassificationConfig(classes=10, channels=(14, 28, 56, 112), final=1680),
    downsamplings=0,
    project_injection=True,
    expansion=5,
    groups=8,
    post_affine=False,
    weight_norm=True,
    dropout=0.3,
    solver=_CIFAR_SOLVER,
)
# The same with Jacobian regularization. Penalties of MDEQ have the mode "jvp": it has the same mean as "vjp", and torch
# cannot vectorize second derivatives of group norms by vjp.
_CIFAR_LARGE_REG = replace(
    _CIFAR_LARGE,
    dropout=0.22,
    solver=replace(_CIFAR_SOLVER, max_steps=8, backward_max_steps=7),
    penalty=PenaltyConfig(strength=0.4, frequency=0.02, probes=2, mode="jvp", stop_epoch=90),
)
# CIFAR-10, 158,890 parameters, 30,720 entries of state.
_CIFAR_TINY = replace(
    _CIFAR_LARGE,
    channels=(24, 24),
    classification=ClassificationConfig(classes=10, channels=(8, 16), final=200),
    project_injection=False,
    dropout=0.25,
)

# ImageNet, 16.8M parameters, 188,160 entries of state.
_IMAGENET_SMALL = replace(
    _CIFAR_LARGE,
    classification=ClassificationConfig(classes=1000, channels=(24, 48, 96, 192), final=2048),
    downsamplings=2,
    post_affine=True,
    dropout=0.0,
    solver=_IMAGENET_SOLVER,
)
_IMAGENET_PENALTY = PenaltyConfig(
    strength=2.5, frequency=0.08, increment=0.1, every=50_000, probes=2, mode="jvp", pretraining_strength=0.03
)
# The same with Jacobian regularization and a wider head: 18.6M parameters.
_IMAGENET_SMALL_REG = replace(
    _IMAGENET_SMALL,
    classification=ClassificationConfig(classes=1000, channels=(28, 56, 112, 224), final=2048),
    post_affine=False,
    dropout=0.02,
    solver=_IMAGENET_REG_SOLVER,
    penalty=_IMAGENET_PENALTY,
)
# ImageNet, 67.1M parameters, 470,400 entries of state.
_IMAGENET_LARGE = replace(
    _IMAGENET_SMALL,
    channels=(80, 160, 320, 640),
    classification=ClassificationConfig(classes=1000, channels=(32, 64, 128, 256), final=2048),
)
# The same with Jacobian regularization.
_IMAGENET_LARGE_REG = replace(
    _IMAGENET_LARGE,
    post_affine=False,
    solver=_IMAGENET_REG_SOLVER,
    penalty=replace(_IMAGENET_PENALTY, strength=3.0),
)
# ImageNet, 90.5M parameters, 517,440 entries of state.
_IMAGENET_XL = replace(_IMAGENET_LARGE, channels=(88, 176, 352, 704), expansion=6)

# Cityscapes, 19 classes of pixels, 8.97M parameters.
_CITYSCAPES_SMALL = replace(
    _IMAGENET_SMALL,
    classification=None,
    segmentation=SegmentationConfig(classes=19, kernel=1),
    dropout=0.05,
    batch_norm_momentum=0.01,
    solver=_CITYSCAPES_SOLVER,
)
# Cityscapes, 55.96M parameters.
_CITYSCAPES_LARGE = replace(_CITYSCAPES_SMALL, channels=(80, 160, 320, 640), dropout=0.03)
# Cityscapes, 79.55M parameters.
_CITYSCAPES_XL = replace(_CITYSCAPES_SMALL, channels=(88, 176, 352, 704), expansion=6, dropout=0.04)

# DEQ-Transformer on WikiText-103, post-LN, 97.9M parameters.
_POST_LN = DEQTransformerConfig(
    vocabulary=267_735,
    d_model=700,
    d_embed=700,
    d_inner=48_000,
    heads=10,
    d_head=70,
    cutoffs=(20_000, 40_000, 200_000),
    div=4,
    tie_weights=True,
    tie_projections=False,
    pre_norm=False,
    weight_norm=True,
    dropout=0.05,
    attention_dropout=0.0,
    memory_length=150,
    window=1000,
    solver=SolverConfig(
        forward="anderson",
        backward="broyden",
        memory=6,
        rtol=1e-3,
        max_steps=30,
        backward_rtol=1e-4,
        backward_max_steps=35,
    ),
)
# The same with Jacobian regularization.
_POST_LN_REG = replace(
    _POST_LN,
    dropout=0.06,
    attention_dropout=0.01,
    memory_length=300,
    solver=replace(_POST_LN.solver, max_steps=12, backward_max_steps=13),
    penalty=PenaltyConfig(strength=1.9, frequency=0.35, increment=0.1, every=35_000),
)
# Pre-LN with Jacobian regularization, 97.9M parameters.
_PRE_LN_REG = replace(
    _POST_LN_REG,
    pre_norm=True,
    solver=replace(_POST_LN.solver, max_steps=14, backward_max_steps=14),
    penalty=PenaltyConfig(strength=2.0, frequency=0.4, increment=0.1, every=30_000),
)

PUBLISHED: dict[str, Config] = {
    "deq_transformer_wt103_post_ln": _POST_LN,
    "deq_transformer_wt103_post_ln_reg": _POST_LN_REG,
    "deq_transformer_wt103_pre_ln_reg": _PRE_LN_REG,
    "mdeq_cifar_large": _CIFAR_LARGE,
    "mdeq_cifar_large_reg": _CIFAR_LARGE_REG,
    "mdeq_cifar_tiny": _CIFAR_TINY,
    "mdeq_cityscapes_large": _CITYSCAPES_LARGE,
    "mdeq_cityscapes_small": _CITYSCAPES_SMALL,
    "mdeq_cityscapes_xl": _CITYSCAPES_XL,
    "mdeq_imagenet_large": _IMAGENET_LARGE,
    "mdeq_imagenet_large_reg": _IMAGENET_LARGE_REG,
    "mdeq_imagenet_small": _IMAGENET_SMALL,
    "mdeq_imagenet_small_reg": _IMAGENET_SMALL_REG,
    "mdeq_imagenet_xl": _IMAGENET_XL,
}
"""In the order of their names."""
