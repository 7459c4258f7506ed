from dataclasses import replace

import pytest

from experiments.paper import EXPERIMENTS, recipes_of
from experiments.paper.command import NAMES, PROFILE_NAMES
from experiments.paper.published import FIGURE7, TABLE1
from experiments.paper.recipes import DECAY, PENALIZED, PLAIN, PROFILES, caps
from pydeq.models import load_config

yaml = pytest.importorskip("yaml")


def test_the_command_knows_all_experiments_and_profiles():
    assert tuple(EXPERIMENTS) == NAMES
    assert set(PROFILES) == set(PROFILE_NAMES)


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_every_experiment_has_trainings_with_labels_that_the_paper_has(name):
    recipes = recipes_of(name)
    for experiment in EXPERIMENTS.values():
        trainings = experiment.trainings(recipes, 2)
        assert trainings
        for group in trainings.values():
            assert [each.config.seed for each in group] == list(range(len(group)))
    assert set(recipes.language.models) <= set(TABLE1)
    assert set(FIGURE7) <= set(recipes.figure7)
    assert {PLAIN, PENALIZED} <= set(recipes.figure8)
    assert any(label.startswith(DECAY) for label in recipes.figure8)
    assert recipes.images.stop in recipes.images.stops
    assert recipes.language.stop in recipes.language.stops


def test_paper_profile_has_the_published_configurations():
    images = recipes_of("paper").images
    plain, penalized = images.training(cap="generous", strength=0.0).config, images.training().config
    assert plain.model == load_config("mdeq_cifar_large")
    assert penalized.model == load_config("mdeq_cifar_large_reg")
    assert (plain.epochs, plain.batch, plain.pretraining.steps, caps(plain)) == (220, 128, 20000, (18, 20))
    assert (penalized.epochs, penalized.batch, penalized.pretraining.steps, caps(penalized)) == (220, 96, 16000, (8, 7))
    assert plain.jacobian_penalty() is None
    language = recipes_of("paper").language.models
    assert language["post-LN, penalized"].model == load_config("deq_transformer_wt103_post_ln_reg")
    assert language["pre-LN, penalized"].model == load_config("deq_transformer_wt103_pre_ln_reg")
    assert [caps(language[f"post-LN{more}"])[0] for more in ("", ", smaller cap", ", smallest cap")] == [30, 20, 15]


def test_paper_profile_has_imagenet_where_it_is_told_where(tmp_path):
    assert recipes_of("paper").imagenet is None
    pairs = recipes_of("paper", imagenet=str(tmp_path)).imagenet
    plain, penalized = (each.config for each in pairs["ImageNet, large"])
    assert plain.model == load_config("mdeq_imagenet_large")
    assert penalized.model == load_config("mdeq_imagenet_large_reg")
    assert penalized.jitter == (-2, 1)
    assert {plain.data.root, penalized.data.root} == {str(tmp_path)}


def test_the_strength_during_pretraining_follows_the_strength():
    images = recipes_of("cpu-long").images
    main = images.training().config.jacobian_penalty()
    assert (main.strength, main.pretraining_strength) == (1.0, 1.0)
    for strength in (0.1, 3.0):
        other = images.training(strength=strength).config.jacobian_penalty()
        assert other == replace(main, strength=strength, pretraining_strength=strength)
    assert images.training(strength=0.0).config.jacobian_penalty().pretraining_strength == 0.0


def test_a_strength_changes_nothing_else_of_the_published_penalty():
    images = recipes_of("paper").images
    published, other = (
        images.training().config.jacobian_penalty(),
        images.training(strength=1.2).config.jacobian_penalty(),
    )
    assert other == replace(published, strength=1.2)
    assert (other.frequency, other.probes, other.stop_epoch) == (0.02, 2, 90)


@pytest.mark.parametrize("name", PROFILE_NAMES)
def test_variants_differ_in_what_they_are_named_after_alone(name):
    images = recipes_of(name).images
    main = images.training()
    assert images.training(strength=main.config.jacobian_penalty().strength).key == main.key
    none = images.training(strength=0.0).config
    assert replace(none, penalty=main.config.penalty) == main.config
    assert none.jacobian_penalty().strength == 0.0
    decayed = images.training(strength=0.0, weight_decay=0.125).config
    assert decayed.optimizer.weight_decay == 0.125
    assert replace(decayed, optimizer=none.optimizer) == none
    generous = images.training(cap="generous").config
    assert caps(generous) == caps(images.plain) != caps(main.config)
    assert generous.jacobian_penalty() == main.config.jacobian_penalty()


def test_experiments_share_their_trainings():
    recipes = recipes_of("cpu")
    keys = {
        name: {label: [each.key for each in group] for label, group in experiment.trainings(recipes, 2).items()}
        for name, experiment in EXPERIMENTS.items()
    }
    assert keys["table3"]["strength 3"] == keys["table2"][PENALIZED]
    assert keys["figure7"]["penalized, small cap"] == keys["figure8"][PENALIZED] == keys["table2"][PENALIZED]
    assert keys["figure7"]["unpenalized, generous cap"] == keys["table2"][PLAIN]
    assert keys["figure7"]["unpenalized, small cap"] == keys["figure8"][PLAIN] == keys["table3"]["strength 0"]


def test_a_key_is_that_of_a_configuration_with_its_stops():
    training = recipes_of("smoke").images.training()
    assert training.key == recipes_of("smoke").images.training().key
    assert training.key != training.with_seed(1).key
    assert training.key != replace(training, stops=(1,)).key
    assert training.key != recipes_of("smoke", device="cpu").images.training().key


def test_unknown_profile():
    with pytest.raises(ValueError, match="profile must be one of cpu, cpu-long, paper, smoke, got 'fast'"):
        recipes_of("fast")
