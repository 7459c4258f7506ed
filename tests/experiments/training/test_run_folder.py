"""The folder of a training gives back its model, or says what became of it."""

import json
import shutil

import pytest
import torch
from small_trainings import small

import experiments
from experiments import data, training
from experiments.command_line import main
from experiments.training.checkpoint import CheckpointError, Checkpoints, read
from experiments.training.run import locked
from pydeq import models

pytest.importorskip("safetensors")

MODELS = ["mlp", "conv", "transformer", "ignn"]
TEXT = "the cat sat on the mat, and the dog sat on the cat.\n" * 80


def text_config(tmp_path, **values):
    path = tmp_path / "some text.txt"
    path.write_text(TEXT, encoding="utf-8")
    options = {
        "data__name": str(path), "data__level": "char", "data__length": 16, "model__vocabulary": 40, "batch": 16,
    }  # fmt: skip
    return small("transformer", **(options | values))


def assert_same_parameters(one, other):
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


class Stopped(Exception):  # noqa: N818
    pass


class Stopping(training.Observer):
    """Ends a training after a step."""

    def __init__(self, step):
        self.step = step
        self.notices = []

    def noticed(self, text):
        self.notices.append(text)

    def advanced(self, step):
        if step == self.step:
            raise Stopped("out of patience")


@pytest.mark.parametrize("model", MODELS)
def test_load_gives_the_trained_model(tmp_path, model):
    config = small(model)
    result = training.train(config, out=tmp_path)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run = experiments.load_run(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert (run.folder, run.config, run.step, run.status) == (tmp_path, config, 6, "finished")
    assert repr(run) == f"Run({type(result.model).__name__} after 6 steps, finished, in {tmp_path})"
    assert not run.model.training
    assert_same_parameters(run.model, result.model)
    assert_same_parameters(experiments.load(str(tmp_path)), result.model)
    (tmp_path / "model.safetensors").unlink()
    assert_same_parameters(experiments.load(tmp_path), result.model)  # by the last checkpoint


def test_without_its_checkpoints_a_model_is_still_there(tmp_path):
    result = training.train(small(), out=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    assert_same_parameters(experiments.load(tmp_path), result.model)


def test_the_best_is_that_of_the_best_evaluation(tmp_path):
    config = small("mlp", steps=12, optimizer__lr=0.3, checkpoint__keep=100, evaluation__every_steps=2, seed=3)
    history = training.train(config, out=tmp_path).history
    metrics = history.column("metric")
    best = history.best("accuracy")
    assert best.metric == max(metrics)
    assert best.step == 2 * (metrics.index(max(metrics)) + 1) < 12
    run = experiments.load_run(tmp_path, "best")
    assert run.step == best.step
    tensors = read(tmp_path / "checkpoints" / f"{best.step:08d}").tensors
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"model.{name}"]), name


def test_the_best_perplexity_is_the_lowest():
    rows = [training.EvaluationRow(1.0, metric, 1.0, 0.1, step=i) for i, metric in enumerate((9.0, 4.0, 5.0, 4.0))]
    rows.append(training.EvaluationRow(1.0, float("nan"), 1.0, 0.1, step=4))
    assert training.History([], rows).best("perplexity").step == 1
    assert training.History([], rows).best("accuracy").step == 0
    assert training.History().best("accuracy") is None


def test_an_unfinished_training_has_the_model_of_its_last_checkpoint(tmp_path):
    with pytest.raises(Stopped):
        training.train(small(), out=tmp_path, observers=[Stopping(5)])
    run = experiments.load_run(tmp_path)
    assert (run.step, run.status) == (4, "unfinished")
    tensors = read(Checkpoints(tmp_path / "checkpoints").paths()[0]).tensors
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, tensors[f"model.{name}"]), name
    assert not (tmp_path / "failed.txt").exists()


def test_a_training_that_was_made_longer_has_newer_parameters(tmp_path):
    training.train(small(), out=tmp_path)
    with pytest.raises(Stopped):
        training.train(small(steps=12), out=tmp_path, resume=True, observers=[Stopping(9)])
    run = experiments.load_run(tmp_path)
    assert (run.step, run.status) == (8, "unfinished")


def test_the_best_of_a_training_that_was_made_longer_is_of_an_unfinished_one(tmp_path):
    config = small(
        "mlp", steps=8, evaluation__every_steps=2, optimizer__lr=1e-9
    )  # no evaluation is better than the first
    training.train(config, out=tmp_path)
    run = experiments.load_run(tmp_path, "best")
    assert (run.step, run.status) == (2, "finished")
    with pytest.raises(Stopped):
        training.train(config.with_values({"steps": 20}), out=tmp_path, resume=True, observers=[Stopping(11)])
    run = experiments.load_run(tmp_path, "best")
    assert (run.step, run.status) == (2, "unfinished")
    assert experiments.load_run(tmp_path).status == "unfinished"


def test_a_trained_model_without_checkpoints_is_kept_from_another_training(tmp_path):
    result = training.train(small(), out=tmp_path)
    shutil.rmtree(tmp_path / "checkpoints")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    message = r"has a trained model already, model.safetensors and best.safetensors, .* or remove these files"
    with pytest.raises(FileExistsError, match=message):
        training.train(small(seed=7), out=tmp_path)
    with pytest.raises(FileExistsError, match=r"has a trained model already, model.safetensors, and no checkpoint"):
        training.train(small(seed=7), out=tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert_same_parameters(experiments.load(tmp_path), result.model)
    for name in ("model", "best"):
        (tmp_path / f"{name}.safetensors").unlink()
    with pytest.raises(Stopped):  # the result of the earlier training must not be taken for this one's
        training.train(small(seed=7), out=tmp_path, observers=[Stopping(5)])
    run = experiments.load_run(tmp_path)
    assert (run.step, run.status, run.config.seed) == (4, "unfinished", 7)
    assert not (tmp_path / "result.json").exists()


def test_a_start_removes_what_a_training_without_checkpoints_left(tmp_path):
    options = {"checkpoint__every_steps": 100, "steps": 200, "evaluation__every_steps": 2}
    with pytest.raises(Stopped):
        training.train(small(**options), out=tmp_path, observers=[Stopping(5)])
    assert experiments.load_run(tmp_path, "best").config.seed == 0
    with pytest.raises(FileExistsError, match=r"has a trained model already, best.safetensors, and no checkpoint"):
        training.train(small(**options, seed=7), out=tmp_path)
    watching = Stopping(1)
    with pytest.raises(Stopped):
        training.train(small(**options, seed=7), out=tmp_path, resume=True, observers=[watching])
    assert f"removed from {tmp_path} what an earlier training left: best.safetensors" in watching.notices
    with pytest.raises(CheckpointError, match="ended after 1 steps, without a checkpoint"):
        experiments.load(tmp_path, "best")


def test_a_damaged_checkpoint_is_passed_over_and_stays(tmp_path):
    with pytest.raises(Stopped):
        training.train(small(), out=tmp_path, observers=[Stopping(5)])
    newest, older = Checkpoints(tmp_path / "checkpoints").paths()
    (newest / "state.json").write_text("{}")
    with pytest.warns(UserWarning, match="00000004 is damaged: .*; using the one of step 2"):
        assert experiments.load_run(tmp_path).step == 2
    assert newest.is_dir()
    (older / "tensors.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is complete: .*00000004 is damaged.*00000002 is damaged"):
        experiments.load(tmp_path)


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere$"):
        experiments.load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"is not the folder of a training: it has no config.json$"):
        experiments.load(tmp_path)
    for name in ("two", "one"):
        training.train(small(steps=0), out=tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no config.json; the trainings in .* are one, two$"):
        experiments.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*three; the trainings in .* are one, two$"):
        experiments.load(tmp_path / "three")
    with pytest.raises(ValueError, match="checkpoint must be last or best, got 'first'"):
        experiments.load(tmp_path / "one", "first")
    (tmp_path / "one" / "checkpoints" / "00000001").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"there is no best.safetensors .* load the last"):
        experiments.load(tmp_path / "one", "best")


def test_a_failed_start_says_so_in_its_folder(tmp_path):
    with pytest.raises(ValueError, match="batch must be at most"):
        training.train(small(batch=512), out=tmp_path)
    text = (tmp_path / "failed.txt").read_text()
    assert text.startswith(
        "The training ended in its first step, or before it, without a checkpoint: ValueError: batch"
    )
    with pytest.raises(CheckpointError, match=r"there is no model in .*\. The training ended in its first step"):
        experiments.load(tmp_path)
    training.train(small(), out=tmp_path)  # a better start clears it
    assert not (tmp_path / "failed.txt").exists()
    assert experiments.load_run(tmp_path).step == 6


def test_an_end_before_the_first_checkpoint_says_so(tmp_path):
    with pytest.raises(Stopped):
        training.train(small(), out=tmp_path, observers=[Stopping(1)])
    with pytest.raises(CheckpointError, match="ended after 1 steps, without a checkpoint: Stopped: out of patience"):
        experiments.load(tmp_path)
    (tmp_path / "failed.txt").unlink()  # as if it had been killed
    with pytest.raises(CheckpointError, match="stopped before its first checkpoint, or still runs"):
        experiments.load(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"status": "diverged", "steps": 1}))
    with pytest.raises(CheckpointError, match="the training diverged before its first checkpoint"):
        experiments.load(tmp_path)


def test_a_refused_start_leaves_a_good_folder_alone(tmp_path):
    training.train(small(), out=tmp_path)
    with pytest.raises(ValueError, match="seed is 1"):
        training.train(small(seed=1), out=tmp_path, resume=True)
    with pytest.raises(FileExistsError), locked(tmp_path / "checkpoints"):
        training.train(small(), out=tmp_path)
    assert not (tmp_path / "failed.txt").exists()
    assert experiments.load_run(tmp_path).status == "finished"


def test_a_diverged_training_gives_its_last_good_parameters_with_a_warning(tmp_path):
    config = small("mlp", optimizer__name="sgd", optimizer__lr=3e38, optimizer__clip=None, steps=30,
                   model__bound=None, schedule__warmup=4, checkpoint__every_steps=1)  # fmt: skip
    result = training.train(config, out=tmp_path)
    assert result.status == "diverged"
    if not Checkpoints(tmp_path / "checkpoints").paths():
        with pytest.raises(CheckpointError, match="diverged before its first checkpoint"):
            experiments.load(tmp_path)
        return
    with pytest.warns(UserWarning, match=r"diverged after \d+ steps: these are the parameters of step \d+"):
        run = experiments.load_run(tmp_path)
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())


@pytest.mark.parametrize("level", ["char", "word"])
def test_a_language_model_keeps_its_vocabulary(tmp_path, level):
    config = text_config(tmp_path, data__level=level, data__length=8)
    training.train(config, out=tmp_path / "out")
    model = experiments.load(tmp_path / "out")
    assert isinstance(model, models.DEQTransformerLM)
    assert model.generation_window == 8 + 6  # a segment and the memory
    known = data.load_text(config.data.name, level=level).vocabulary
    assert model.vocabulary == known
    text = model.generate("the cat", 12, max_steps=60, generator=torch.Generator().manual_seed(0))
    tokens = known.encode("the cat")[None]
    expected = model.generate(
        tokens, 12, max_steps=60, generator=torch.Generator().manual_seed(0), suppress=[known.unk]
    )
    assert text == known.decode(expected[0])
    assert text.startswith("the cat")


@pytest.mark.parametrize("prompt", ["Zzz", "Zzz ", "the  Cat\n", "the cat"])
@pytest.mark.parametrize("level", ["char", "word"])
def test_a_text_begins_with_the_prompt_and_has_no_unknown_words(tmp_path, level, prompt):
    training.train(text_config(tmp_path, data__level=level, data__length=8, steps=0), out=tmp_path / "out")
    model = experiments.load(tmp_path / "out")
    known = model.vocabulary
    tokens = known.encode(prompt)[None]
    options = {"temperature": 3.0, "max_steps": 20}  # all words are about as probable
    text = model.generate(prompt, 30, generator=torch.Generator().manual_seed(0), **options)
    new = model.generate(tokens, 30, generator=torch.Generator().manual_seed(0), suppress=[known.unk], **options)
    new = new[0, tokens.shape[1] :]
    assert known.unk not in new
    unrestricted = model.generate(tokens, 30, generator=torch.Generator().manual_seed(0), **options)
    assert known.unk in unrestricted[0, tokens.shape[1] :]
    end = known.decode(new)
    between = " " if level == "word" and not prompt[-1].isspace() and not end.startswith("\n") else ""
    assert text == prompt + between + end


def test_generate_prints_a_continuation(tmp_path, capsys):
    training.train(text_config(tmp_path), out=tmp_path / "out")
    command = ["generate", str(tmp_path / "out"), "--prompt", "the cat", "--tokens", "20"]
    printed = []
    for options in ([], [], ["--seed", "1"], ["--checkpoint", "best", "--temperature", "0"]):
        assert main([*command, *options]) == 0
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1] != printed[2]
    assert all(text.startswith("the cat") and len(text) == 28 for text in printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["mlp"], "RUN must have a language model, got mlp with ImplicitMLP"),
        (["transformer"], "this model has no vocabulary to read a text with"),  # of numbers, not of text
        (["text", "--top-k", "0"], "top_k must be at least 1, got 0"),
        (["text", "--prompt", ""], "with a length of at least 1"),
    ],
)
def test_mistakes_of_generate_are_named(tmp_path, capsys, monkeypatch, arguments, message):
    config = text_config(tmp_path, steps=0) if arguments[0] == "text" else None
    monkeypatch.chdir(tmp_path)
    if arguments[0] != "nowhere":
        training.train(config or small(arguments[0], steps=0), out=arguments[0])
    assert main(["generate", *arguments]) == 1
    captured = capsys.readouterr().err
    assert captured.startswith("error: ")
    assert message in captured


@pytest.mark.parametrize(
    ("command", "status"), [(["generate", "run"], 1), (["train", "conv_digits"], 1), (["reproduce", "all"], 2)]
)
def test_a_device_that_torch_lacks_is_named(tmp_path, capsys, monkeypatch, command, status):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    training.train(text_config(tmp_path, steps=0), out="run")
    capsys.readouterr()
    assert main([*command, "--device", "cuda"]) == status
    captured = capsys.readouterr().err
    assert "torch has no CUDA here, got" in captured
    assert captured.count("\n") == 1
