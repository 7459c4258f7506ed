"""The size of each profile's measurements. Profiles share targets and names of figures; smoke takes smaller batches."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """The size of one run.

    Args:
        threads: Thread counts of the overheads and the kernels. Everything else runs on one thread, since other load
            disturbs one thread least.
        overhead_shapes: (B, D) of the overhead per iteration.
        overhead_repeats: Timed solves of each side ...
        overhead_seconds: ... or only three, if they take longer than this.
        kernel_shapes: (B, D) of the kernel timings; the last one exceeds most caches.
        kernel_rounds: Timed calls of each kernel; shapes that exceed the caches take a fifth of them.
        nfe_dims, nfe_rhos: State sizes and spectral radii of the tanh maps.
        nfe_seeds: Maps of each kind.
        nfe_repeats: Timed solves of each side, on the first of these maps.
        import_repeats: Fresh processes of each side.
        digits_epochs, digits_seeds: Length and number of the trainings.
        compat_repeats: Timed solves and steps of each side of the replacement of torchdeq.
        training_repeats: Timed training steps of each side.
        training_share: The share of a batch that training steps and penalties take; titles name the whole batch.
        left_out_models: Reference models that are not measured, by their keys.
        jacobian_repeats: Timed penalties of each side.
        jacobian_draws: Estimates for each relative error.
        differences_seeds: Trainings with each penalty; 0 leaves them out.
        adjoints_epochs: Length of the trainings before adjoints are compared.
        adjoints_batch: Samples that adjoints are compared on.
        adjoints_repeats: Timed steps with each adjoint.
        contest_problems: Families of problems, or the beginnings of their keys; None for all.
        contest_repeats: Timed solves of each solver on each problem ...
        contest_seconds: ... or as many as fit in a tenth of this time, at least one. After this time a solve is given
            up.
    """

    name: str
    threads: tuple[int, ...]
    overhead_shapes: tuple[tuple[int, int], ...]
    overhead_repeats: int
    overhead_seconds: float
    kernel_shapes: tuple[tuple[int, int], ...]
    kernel_rounds: int
    nfe_dims: tuple[int, ...]
    nfe_rhos: tuple[float, ...]
    nfe_seeds: int
    nfe_repeats: int
    import_repeats: int
    digits_epochs: int
    digits_seeds: int
    compat_repeats: int
    training_repeats: int
    training_share: float
    left_out_models: tuple[str, ...]
    jacobian_repeats: int
    jacobian_draws: int
    differences_seeds: int
    adjoints_epochs: int
    adjoints_batch: int
    adjoints_repeats: int
    contest_problems: tuple[str, ...] | None
    contest_repeats: int
    contest_seconds: float


SHAPES = ((32, 512), (32, 8192), (8, 65536))
BEYOND_CACHE = (32, 262144)
# Root finding, and a trained cell. With all libraries, of which some compile, each takes about a minute.
CONTEST = (
    "burkardt.broyden_tridiagonal",
    "cell.ignn_cora.rtol1e-05",
)

PROFILES = {
    profile.name: profile
    for profile in (
        Profile(
            "smoke",
            threads=(1,),
            overhead_shapes=SHAPES[:2],
            overhead_repeats=3,
            overhead_seconds=1.0,
            kernel_shapes=SHAPES[:2],
            kernel_rounds=10,
            nfe_dims=(128,),
            nfe_rhos=(0.5, 0.95),
            nfe_seeds=1,
            nfe_repeats=1,
            import_repeats=1,
            digits_epochs=1,
            digits_seeds=1,
            compat_repeats=2,
            training_repeats=1,
            training_share=0.25,
            left_out_models=("mdeq_large",),  # its code is that of mdeq_tiny
            jacobian_repeats=1,
            jacobian_draws=2,
            differences_seeds=1,
            adjoints_epochs=1,
            adjoints_batch=8,
            adjoints_repeats=1,
            contest_problems=("burkardt.broyden_tridiagonal", "runaway.near_miss"),
            contest_repeats=1,
            contest_seconds=1.0,
        ),
        Profile(
            "quick",
            threads=(1, 2),
            overhead_shapes=SHAPES,
            overhead_repeats=5,
            overhead_seconds=8.0,
            kernel_shapes=(*SHAPES, BEYOND_CACHE),
            kernel_rounds=25,
            nfe_dims=(128,),
            nfe_rhos=(0.5, 0.8, 0.95),
            nfe_seeds=3,
            nfe_repeats=3,
            import_repeats=2,
            digits_epochs=2,
            digits_seeds=1,
            compat_repeats=20,
            training_repeats=3,
            training_share=1.0,
            left_out_models=("mdeq_large",),  # its code is that of mdeq_tiny
            jacobian_repeats=3,
            jacobian_draws=4,
            differences_seeds=0,
            adjoints_epochs=4,
            adjoints_batch=32,
            adjoints_repeats=3,
            contest_problems=CONTEST,
            contest_repeats=3,
            contest_seconds=1.0,
        ),
        Profile(
            "full",
            threads=(1, 2),
            overhead_shapes=SHAPES,
            overhead_repeats=25,
            overhead_seconds=40.0,
            kernel_shapes=(*SHAPES, BEYOND_CACHE),
            kernel_rounds=200,
            nfe_dims=(128, 1024),
            nfe_rhos=(0.5, 0.8, 0.95),
            nfe_seeds=10,
            nfe_repeats=15,
            import_repeats=15,
            digits_epochs=20,
            digits_seeds=3,
            compat_repeats=120,
            training_repeats=25,
            training_share=1.0,
            left_out_models=(),
            jacobian_repeats=25,
            jacobian_draws=200,
            differences_seeds=3,
            adjoints_epochs=12,
            adjoints_batch=32,
            adjoints_repeats=15,
            contest_problems=None,
            contest_repeats=15,
            contest_seconds=20.0,
        ),
    )
}
