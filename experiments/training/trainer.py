"""The training loop."""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.training import snapshot
from experiments.training.atomic_files import write_whole
from experiments.training.checkpoint import CheckpointError, Checkpoints, read, save_tensors, writing
from experiments.training.configuration import TrainingConfig
from experiments.training.distribution import Distribution, local, whole
from experiments.training.evaluation import ModelEvaluator, autocast, has_fast_bfloat16
from experiments.training.history import Evaluation, EvaluationRow, History, Result, StepRow
from experiments.training.observers import Observer
from experiments.training.optimizers import build_optimizer, set_learning_rate
from experiments.training.penalties import PenaltySchedule, cap
from experiments.training.run_folder import BEST, CONFIG, FAILURE, RESULT, TRAINED, VOCABULARY, remove_earlier
from experiments.training.running_means import RunningMeans
from experiments.training.schedules import learning_rate
from experiments.training.seeds import Purpose, seed_of
from experiments.training.tasks import task_of
from pydeq.models import build
from pydeq.ops.kernels import package_version
from pydeq.solution import ConvergenceWarning, Solution


class Trainer:
    """One training, from its configuration to its result.

    Args:
        config: The configuration.
        distribution: The ranks that train.
        observers: Called on rank 0.
        out: The folder; None to write nothing.
    """

    def __init__(
        self, config: TrainingConfig, distribution: Distribution, observers: Sequence[Observer], out: Path | None
    ) -> None:
        self.config, self.distribution, self.out = config, distribution, out
        self.observers = list(observers) if distribution.main else []
        self.task = task_of(config)(config, distribution)
        per_epoch = self.task.steps_per_epoch
        self.steps = config.steps if config.steps is not None else (config.epochs or 0) * per_epoch
        torch.manual_seed(seed_of(config.seed, Purpose.PARAMETERS))
        self.model = build(config.model).to(distribution.device)
        self.wrapped = distribution.wrap(self.model)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad and p.numel()]
        self.optimizer = build_optimizer(config.optimizer, self.parameters)
        self.scaler = torch.amp.GradScaler(distribution.device.type, enabled=config.amp == "fp16")
        self.penalties = PenaltySchedule(config.jacobian_penalty(), config.pretraining.steps, config.seed)
        self.evaluate = ModelEvaluator(
            self.task, self.model, self.wrapped, config.evaluation, config.amp, distribution, config.seed
        )
        every = config.evaluation
        self.evaluation_steps = every.every_steps or (every.every_epochs or 1) * per_epoch
        self.checkpoint_steps = config.checkpoint.every_steps or self.evaluation_steps
        self.checkpoints = None if out is None else Checkpoints(out / "checkpoints", config.checkpoint.keep)
        self.fingerprint = "" if out is None else self.task.fingerprint()
        self.history = History()
        self.step = 0
        self.means, self.means_of_evaluation = RunningMeans(distribution.device), RunningMeans(distribution.device)
        self.seconds_before, self._began = 0.0, time.monotonic()
        # Dropout and probes differ from rank to rank.
        torch.manual_seed(seed_of(config.seed, Purpose.RANK, distribution.rank))

    @property
    def seconds(self) -> float:
        """Training time, without pauses."""
        return self.seconds_before + time.monotonic() - self._began

    def resume(self) -> bool:
        """Continue from the newest complete checkpoint; return False if there is none."""
        assert self.checkpoints is not None
        found, error = None, None
        if self.distribution.main:
            try:
                found = self.checkpoints.newest(self._notice)
            except CheckpointError as failed:
                error = str(failed)
        path, error = self.distribution.broadcast((found and found.path, error))
        if error is not None:
            raise CheckpointError(error)
        if path is None:
            self._notice(f"there is no checkpoint in {self.checkpoints.folder}: starting from the beginning")
            return False
        found = read(path) if found is None else found
        self.load_state_dict(found.tensors | found.state)
        return True

    def state_dict(self) -> dict[str, Any]:
        """The state that the training keeps from one step to the next, by flat names.

        Tensors, and values that JSON can hold. Values that follow from the number of the step are left out: the order
        of samples, learning rates, caps, the choice of penalized steps. All ranks must call; only rank 0's result
        counts.
        """
        gather = self.distribution.gather
        state: dict[str, Any] = {f"model.{key}": each for key, each in snapshot.model_tensors(self.model).items()}
        moments = snapshot.optimizer_tensors(self.model, self.optimizer)
        state |= {f"optimizer.{key}": each for key, each in moments.items()}
        state |= {f"task.{key}": snapshot.portable(torch.cat(gather(each))) for key, each in self.task.state().items()}
        for key, each in self._rank_state().items():
            state |= {f"rank{rank}.{key}": snapshot.portable(part) for rank, part in enumerate(gather(each))}
        versions = {"pydeq": package_version(), "torch": torch.__version__, "python": platform.python_version()}
        return state | {
            "step": self.step, "seconds": self.seconds, "world": self.distribution.world,
            "config": self.config.mapping(), "data": self.fingerprint, "scaler": self.scaler.state_dict(),
            "history": self.history.mapping(), "versions": versions,
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of :meth:`state_dict` in a new training; observers get a notice about differences in the
        last bits.

        Raises:
            CheckpointError: If something is missing, or has another shape.
            ValueError: If the state belongs to another configuration or other data.
        """
        snapshot.check_configuration(state["config"], self.config.mapping(), self._notice)
        if state["data"] != self.fingerprint:
            raise ValueError(f"data {self.config.data.name!r} is not what the training began with: its files differ")
        snapshot.load_model_tensors(self.model, state, "model.")
        snapshot.load_optimizer_tensors(self.model, self.optimizer, state, "optimizer.")
        rank, world, device = self.distribution.rank, self.distribution.world, self.distribution.device
        carried = {key.removeprefix("task."): each for key, each in state.items() if key.startswith("task.")}
        if carried:
            self.task.load({key: each.tensor_split(world)[rank].to(device) for key, each in carried.items()})
        self.step, self.seconds_before = state["step"], state["seconds"]
        self.history = History.of(state["history"])
        self.scaler.load_state_dict(state["scaler"])
        self._load_rank_state(state)

    def _rank_state(self) -> dict[str, Tensor]:
        """The tensors that differ from rank to rank, on the ranks' device."""
        device = self.distribution.device
        tensors = {
            "means": self.means.sums,
            "means_of_evaluation": self.means_of_evaluation.sums,
            "rng.cpu": torch.get_rng_state().to(device),
        }
        if device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state(device).to(device)
        return tensors

    def _load_rank_state(self, state: dict[str, Any]) -> None:
        rank, world, device = self.distribution.rank, self.distribution.world, self.distribution.device
        before: int = state["world"]
        for name, means in (("means", self.means), ("means_of_evaluation", self.means_of_evaluation)):
            parts = [means.widened(snapshot.found(state, f"rank{r}.{name}")) for r in range(before)]
            if before == world:
                means.sums = parts[rank].to(device)
            elif rank == 0:
                means.sums = torch.stack(parts).sum(0).to(device)
        if before != world:
            self._notice(f"the training had {before} processes and has {world} from here on")
            torch.manual_seed(seed_of(self.config.seed, Purpose.RANK, (self.step << 20) + rank))
            return
        torch.set_rng_state(state[f"rank{rank}.rng.cpu"])
        if device.type == "cuda":
            saved = state.get(f"rank{rank}.rng.cuda")
            if saved is None:
                self._notice("the training was on another device: its random numbers differ from here on")
            else:
                torch.cuda.set_rng_state(saved, device)

    def run(self) -> Result:
        """Train to the end."""
        status = "finished"
        if self.out is not None:  # not earlier: a refused configuration must not replace that of the training
            self._write_config(self.out)
        self._began = time.monotonic()
        self._tell("began", self.config, self.history, self.step, self.steps, self.task.metric)
        if self.config.amp == "bf16" and not has_fast_bfloat16(self.distribution.device):
            self._notice("this CPU has no fast bfloat16: with amp none, convolutions take a tenth of the time")
        self.wrapped.train()
        with self._quiet():
            while self.step < self.steps and status == "finished":
                self._update(self.step)
                self.step += 1
                self._tell("advanced", self.step)
                if (found := self._report()) is not None:
                    status = "diverged"
                    self._notice(f"{found} not finite at step {self.step}: lower the learning rate, raise the cap on"
                                 " evaluations, or penalize the Jacobian")  # fmt: skip
            test = self._test() if status == "finished" else None
        result = Result(status, self.task.metric, self.history, test, self.step, self.model, self.out)
        if self.out is not None:
            self._write_result(result, self.out)
        self._tell("ended", status, test)
        return result

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        with warnings.catch_warnings():
            # Adjoint solves are capped on purpose, and every row has their residuals.
            warnings.simplefilter("ignore", ConvergenceWarning)
            # The warning is about writing into a model's outputs; nothing here does that.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
            yield

    def _update(self, step: int) -> None:
        """Do one step: forward and backward of all parts, and the update of the parameters."""
        config, epoch = self.config, step // self.task.steps_per_epoch
        shallow = step < config.pretraining.steps
        options: dict[str, Any] = {"layers": config.pretraining.layers} if shallow else {"max_steps": cap(config, step)}
        options["penalty"] = self.penalties.penalty(step, epoch)
        set_learning_rate(self.optimizer, learning_rate(config.schedule, config.optimizer.lr, step, self.steps))
        parts = self.task.parts(step)
        for i, part in enumerate(parts):
            with self.distribution.accumulating(self.wrapped, last=i == len(parts) - 1):
                with autocast(config.amp, self.distribution.device):
                    loss, solution = self.task.loss(self.wrapped, part, **options)
                penalty = loss.new_zeros(()) if solution.penalty is None else solution.penalty
                self.scaler.scale((loss + penalty) / len(parts)).backward()
            seen: dict[str, Tensor | float] = {
                "loss": loss, "penalty": penalty, "residual": solution.relative_residual.mean(),
                "nfe": config.pretraining.layers if shallow else solution.nfe,
            }  # fmt: skip
            if not shallow:
                seen["converged"] = _share(solution)
            if solution.backward is not None:
                seen["backward_nfe"] = solution.backward.nfe
                seen["backward_residual"] = solution.backward.relative_residual.mean()
                seen["backward_converged"] = _share(solution.backward)
            self._observe(**seen)
        if config.optimizer.clip is not None:
            self.scaler.unscale_(self.optimizer)
            norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip))
            if config.amp != "fp16" or bool(norm.isfinite()):  # in this order: isfinite waits for the device
                self._observe(gradient_norm=norm)
        self.scaler.step(self.optimizer)  # skips steps with gradients that overflowed
        self.scaler.update()
        self.optimizer.zero_grad()

    def _observe(self, **values: Tensor | float) -> None:
        self.means.add(**values)
        self.means_of_evaluation.add(**values)

    def _report(self) -> str | None:
        """Write the rows, evaluations and checkpoints that are due; describe a value that is not finite, or None."""
        last = self.step == self.steps
        evaluating = last or self.step % self.evaluation_steps == 0
        saving = self.checkpoints is not None and (last or self.step % self.checkpoint_steps == 0)
        logging = evaluating or self.step % self.config.logging.every_steps == 0
        found = self._not_finite() if logging or saving else None
        if found is not None:
            self._row()
            return found  # the last checkpoint is older than the failure
        if logging:
            self._row()
        if evaluating:
            self._evaluate()
            if self.out is not None and self.history.best(self.task.metric) is self.history.evaluations[-1]:
                self._write_parameters(self.out / BEST)
        if saving:
            self._save()
        return None

    def _not_finite(self) -> str | None:
        """Describe a value that is infinite or NaN on any rank: a loss since the last row, or parameters."""
        if not self.means.finite(self.distribution):
            return "the loss is"
        # A gradient that is not finite spoils the parameters, even if the loss of its step was finite.
        bad = torch.stack([~local(parameter.detach()).isfinite().all() for parameter in self.parameters]).sum()
        return "parameters are" if int(self.distribution.sum(bad)) else None

    def _test(self) -> Evaluation:
        """Evaluate on test data; take the last row if it is such an evaluation."""
        rows = self.history.evaluations
        if self.task.validates_on_test and rows and rows[-1].step == self.step:
            return Evaluation(**{each.name: getattr(rows[-1], each.name) for each in fields(Evaluation)})
        return self.evaluate("test")

    def _save(self) -> None:
        """Write a checkpoint; if that fails, all ranks raise."""
        assert self.checkpoints is not None
        checkpoints, state = self.checkpoints, self.state_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        numbers = {name: value for name, value in state.items() if name not in tensors}
        self._on_main(lambda: checkpoints.write(self.step, tensors, numbers))

    def _write_config(self, out: Path) -> None:
        """Write the configuration and the vocabulary; at a start, first remove the files of an earlier training."""
        files = {CONFIG: json.dumps(self.config.mapping(), indent=2) + "\n"}
        if self.task.vocabulary is not None:
            files[VOCABULARY] = json.dumps(self.task.vocabulary.mapping(), ensure_ascii=False) + "\n"

        def write() -> None:
            removed = [] if self.step else remove_earlier(out)
            if removed:
                self._notice(f"removed from {out} what an earlier training left: {', '.join(removed)}")
            for name, text in files.items():
                with writing(out / name):
                    write_whole(out / name, text)
            with writing(out / FAILURE):  # of an earlier start
                (out / FAILURE).unlink(missing_ok=True)

        self._on_main(write)

    def _write_parameters(self, path: Path) -> None:
        """Write the present parameters into one file; all ranks must call."""
        tensors = snapshot.model_tensors(self.model)
        self._on_main(lambda: save_tensors(path, tensors, {"step": str(self.step)}))

    def _write_result(self, result: Result, out: Path) -> None:
        """Write the trained parameters and the evaluation on test data."""
        if result.status == "finished":
            self._write_parameters(out / TRAINED)
        summary = {
            "status": result.status, "metric": result.metric, "steps": result.steps,
            "test": None if result.test is None else asdict(result.test),
        }  # fmt: skip

        def write() -> None:
            with writing(out / RESULT):
                write_whole(out / RESULT, json.dumps(summary, indent=2) + "\n")

        self._on_main(write)

    def _on_main(self, write: Callable[[], object]) -> None:
        """Call ``write`` on rank 0; if the disk fails there, all ranks raise."""
        error: Exception | None = None
        if self.distribution.main:
            try:
                write()
            except (OSError, CheckpointError) as failed:
                error = failed
        message = self.distribution.broadcast(None if error is None else str(error))
        if error is not None:
            raise error
        if message is not None:
            raise CheckpointError(f"on rank 0: {message}")

    def _tell(self, what: str, *arguments: Any) -> None:
        for observer in self.observers:
            getattr(observer, what)(*arguments)

    def _notice(self, text: str) -> None:
        self._tell("noticed", text)

    def _row(self) -> None:
        done = self.step - 1
        epoch = done // self.task.steps_per_epoch
        means = self.means.take(self.distribution)
        row = StepRow(
            step=self.step, epoch=epoch, loss=_number(means["loss"]), penalty=_number(means["penalty"]),
            learning_rate=self.optimizer.param_groups[0]["lr"], strength=self.penalties.strength(done, epoch),
            nfe=_number(means["nfe"]), residual=_number(means["residual"]), backward_nfe=means["backward_nfe"],
            backward_residual=means["backward_residual"], gradient_norm=means["gradient_norm"],
            loss_scale=self.scaler.get_scale() if self.scaler.is_enabled() else None, seconds=self.seconds,
            converged=means["converged"], backward_converged=means["backward_converged"],
        )  # fmt: skip
        self.history.steps.append(row)
        self._tell("stepped", row)

    def _evaluate(self) -> None:
        found, means = self.evaluate(), self.means_of_evaluation.take(self.distribution)
        row = EvaluationRow(
            **vars(found), step=self.step, epoch=self.step // self.task.steps_per_epoch, seconds=self.seconds,
            train_loss=means["loss"], train_penalty=means["penalty"], train_nfe=means["nfe"],
            train_residual=means["residual"], train_backward_nfe=means["backward_nfe"],
            train_backward_residual=means["backward_residual"], train_converged=means["converged"],
            train_backward_converged=means["backward_converged"],
        )  # fmt: skip
        self.history.evaluations.append(row)
        self._tell("evaluated", row)


def _share(solution: Solution) -> Tensor:
    """The share of samples that converged, 0-d, on their device."""
    return solution.converged.double().mean()


def _number(value: float | None) -> float:
    return float("nan") if value is None else value
