"""The size of each profile's measurements. Profiles share shapes, targets and names of figures."""

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
        kernel_shapes: (B, D) of the kernel timings; the last one exceeds any cache.
        kernel_rounds: Timed calls of each kernel; shapes that exceed the caches take a fifth of them.
        nfe_dims, nfe_rhos: State sizes and spectral radii of the tanh maps.
        nfe_seeds: Maps of each kind.
        nfe_repeats: Timed solves of each side, on the first of these maps.
        import_repeats: Fresh processes of each side.
        digits_epochs, digits_seeds: Length and number of the trainings.
        training_repeats: Timed training steps of each side.
        jacobian_repeats: Timed penalties of each side.
        jacobian_draws: Estimates for each relative error.
        adjoints_epochs: Length of the trainings before adjoints are compared.
        adjoints_repeats: Timed steps with each adjoint.
        contest_problems: Problems of each family; None for all.
        contest_repeats: Timed solves of each solver on each problem ...
        contest_seconds: ... or only three, if a problem takes longer than this; also the time after which a solve is
            given up.
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
    training_repeats: int
    jacobian_repeats: int
    jacobian_draws: int
    adjoints_epochs: int
    adjoints_repeats: int
    contest_problems: int | None
    contest_repeats: int
    contest_seconds: float


SHAPES = ((32, 512), (32, 8192), (8, 65536))
BEYOND_CACHE = (32, 262144)

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
            training_repeats=2,
            jacobian_repeats=2,
            jacobian_draws=4,
            adjoints_epochs=1,
            adjoints_repeats=1,
            contest_problems=1,
            contest_repeats=1,
            contest_seconds=2.0,
        ),
        Profile(
            "quick",
            threads=(1, 2),
            overhead_shapes=SHAPES,
            overhead_repeats=9,
            overhead_seconds=8.0,
            kernel_shapes=(*SHAPES, BEYOND_CACHE),
            kernel_rounds=50,
            nfe_dims=(128, 1024),
            nfe_rhos=(0.5, 0.8, 0.95),
            nfe_seeds=3,
            nfe_repeats=5,
            import_repeats=5,
            digits_epochs=8,
            digits_seeds=2,
            training_repeats=7,
            jacobian_repeats=7,
            jacobian_draws=40,
            adjoints_epochs=6,
            adjoints_repeats=5,
            contest_problems=2,
            contest_repeats=5,
            contest_seconds=5.0,
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
            training_repeats=25,
            jacobian_repeats=25,
            jacobian_draws=200,
            adjoints_epochs=12,
            adjoints_repeats=15,
            contest_problems=None,
            contest_repeats=15,
            contest_seconds=20.0,
        ),
    )
}
