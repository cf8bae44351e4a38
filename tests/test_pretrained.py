"""Weights that come with the package, and the order in which a lesson looks for some."""

import json
import os

import pytest
import torch

from ddpm_utils import checkpoints, config, data, evaluation, pretrained, runtime, training
from ddpm_utils.pretrained import make
from ddpm_utils.unet import UNet

pytestmark = pytest.mark.usefixtures("own_folders")
SHIPPED = pretrained.names()
CLASSIFIERS = pretrained.classifier_names()
SHIPPED_FOLDER = pretrained.FOLDER


@pytest.fixture
def shelf(monkeypatch, tmp_path):
    """An empty folder in place of the shipped weights; call it to put a network there."""
    folder = tmp_path / "shelf"
    folder.mkdir()
    monkeypatch.setattr(pretrained, "FOLDER", folder)

    def put(name, cfg, model):
        torch.save(model.state_dict(), folder / f"{name}.pt")
        card = {"config": cfg.to_dict(), "minutes": 1.0, "hardware": "CPU"}
        (folder / f"{name}.json").write_text(json.dumps(card))
        return folder / f"{name}.pt"

    return put


def keep(
    cfg,
    model,
    name,
    steps=3,
    age=0,
):
    """A checkpoint of lesson 04 under the project's folder, `age` seconds old."""
    state = training.TrainState(cfg, model)
    state.step = steps
    path = checkpoints.save(runtime.checkpoint_dir("lesson_04", name) / "last.pt", state)
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


def equal(a, b) -> bool:
    return all(
        torch.equal(x, y)
        for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def test_load_gives_the_network_in_eval_mode_and_its_config(shelf, tiny, net):
    cfg = tiny()
    shelf("small", cfg, net(cfg))
    model, found = pretrained.load("small")
    assert (
        found == cfg
        and equal(model, net(cfg))
        and not model.training
        and pretrained.names() == ["small"]
    )


@pytest.mark.parametrize("call", [pretrained.card, pretrained.load])
def test_an_unknown_name_lists_the_known_ones(shelf, tiny, net, call):
    with pytest.raises(FileNotFoundError, match="'large': there are none"):
        call("large")
    shelf("small", tiny(), net(tiny()))
    with pytest.raises(FileNotFoundError, match="'large': there are small"):
        call("large")


@pytest.mark.parametrize("spoil", ["cut short", "another network", "a list", "gone"])
def test_damaged_weights_are_refused_by_name(shelf, tiny, net, spoil):
    path = shelf("small", tiny(), net(tiny()))
    if spoil == "cut short":
        path.write_bytes(path.read_bytes()[:-500])
    elif spoil == "another network":
        torch.save({"a": torch.zeros(1)}, path)
    elif spoil == "a list":
        torch.save([1], path)
    else:
        path.unlink()
    with pytest.raises(FileNotFoundError if spoil == "gone" else ValueError, match="small.pt"):
        pretrained.load("small")


def test_matching_looks_at_what_the_weights_mean(shelf, tiny, net):
    shelf("small", tiny(), net(tiny()))
    assert pretrained.matching(tiny(lr=1e-3, seed=4, epochs=9)) == "small"
    assert pretrained.matching(tiny(target="eps")) is None


def test_obtain_takes_the_newest_own_checkpoint_that_fits(shelf, tiny, net, capsys):
    cfg = tiny()
    shelf("small", cfg, net(cfg, 9))
    keep(cfg, net(cfg, 1), "old", steps=11, age=100)
    keep(cfg.replace(lr=1e-3), net(cfg, 2), "new", steps=22)
    keep(cfg.replace(target="eps"), net(cfg, 3), "other", steps=33, age=-100)
    model = pretrained.obtain(cfg)
    assert equal(model, net(cfg, 2)) and not model.training
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "weights: your own, from checkpoints/lesson_04/new/last.pt, 22 steps"


def test_obtain_passes_over_a_damaged_checkpoint_and_tells_no_absolute_path(
    shelf,
    tiny,
    net,
    capsys,
    tmp_path,
):
    cfg = tiny()
    shelf("small", cfg, net(cfg, 9))
    path = keep(cfg, net(cfg), "new")
    path.write_bytes(path.read_bytes()[:-500])
    assert equal(pretrained.obtain(cfg), net(cfg, 9))
    passed, found = capsys.readouterr().out.splitlines()
    assert "passed over checkpoints/lesson_04/new/last.pt" in passed and "small" in found
    assert str(tmp_path) not in passed


def test_obtain_trains_when_nothing_fits_and_says_so_loudly(shelf, tiny, capsys):
    state = torch.get_rng_state()
    model = pretrained.obtain(tiny(epochs=0.02), seconds=0.3)
    assert isinstance(model, UNet) and not model.training and model.head.weight.abs().sum() > 0
    out = capsys.readouterr().out
    assert "WEIGHTS: NONE FIT THIS CONFIG" in out and "weights: trained" in out
    assert not runtime.checkpoint_dir().exists()
    torch.set_rng_state(state)


def test_fast_mode_keeps_to_its_own_folder(shelf, tiny, net, monkeypatch):
    cfg = tiny()
    keep(cfg, net(cfg, 1), "slow")
    monkeypatch.setenv("DDPM_FAST", "1")
    keep(cfg, net(cfg, 2), "fast")
    assert equal(pretrained.obtain(cfg), net(cfg, 2))
    monkeypatch.delenv("DDPM_FAST")
    assert equal(pretrained.obtain(cfg), net(cfg, 1))


@pytest.mark.parametrize("name", make.RECIPES)
def test_recipes_share_the_weights_of_the_default_config(name):
    recipe = make.RECIPES[name]
    assert name in (recipe.dataset, f"{recipe.dataset}_labels")
    assert (
        recipe.differences(
            config.TrainConfig(dataset=recipe.dataset, num_classes=recipe.num_classes)
        )
        == []
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_weights_load_are_small_and_have_a_full_card(name):
    model, cfg = pretrained.load(name)
    card = pretrained.card(name)
    assert (
        cfg.replace(label_drop=0.1) == make.RECIPES[name]
        and pretrained.matching(cfg.replace(seed=77)) == name
    )
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert {
        "data",
        "weights",
        "held_out_loss",
        "hardware",
        "torch",
        "minutes",
        "seed",
        "date",
        "license",
    } <= set(card)
    assert 0 < card["held_out_loss"] < 1 and "/" not in card["hardware"]
    assert (SHIPPED_FOLDER / f"{name}.pt").stat().st_size < 8_000_000
    assert all(w.dtype == torch.float32 and w.isfinite().all() for w in model.state_dict().values())


def test_every_weight_file_has_a_card():
    for_cards = SHIPPED + [pretrained.CLASSIFIER + name for name in CLASSIFIERS]
    assert sorted(path.stem for path in SHIPPED_FOLDER.glob("*.pt")) == sorted(for_cards)


# Classifiers


def put_classifier(folder, dataset, seed=0):
    """A random classifier on the shelf, as if it were the shipped one of `dataset`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = evaluation.Classifier()
    torch.save(model.state_dict(), folder / f"{pretrained.CLASSIFIER}{dataset}.pt")
    card = {"test_accuracy": 0.9, "recipe": make.CLASSIFIERS.get(dataset)}
    (folder / f"{pretrained.CLASSIFIER}{dataset}.json").write_text(json.dumps(card))
    return model


def accuracy(model, image_set) -> float:
    probabilities = evaluation.class_probabilities(
        model, evaluation.extract_features(model, image_set.images)
    )
    return (probabilities.argmax(dim=1) == image_set.labels).double().mean().item()


@pytest.mark.parametrize("name", ["fashion_mnist", "mnist"])
def test_shipped_classifiers_load_are_small_and_have_a_full_card(name):
    model, card = pretrained.load_classifier(name), pretrained.card(pretrained.CLASSIFIER + name)
    assert not model.training and card["parameters"] == sum(p.numel() for p in model.parameters())
    assert {
        "data",
        "test_images",
        "hardware",
        "torch",
        "minutes",
        "seed",
        "date",
        "license",
    } <= set(card)
    assert card["recipe"] == make.CLASSIFIERS[name] and card["data"].startswith(data.TITLES[name])
    assert card["test_accuracy"] >= {"fashion_mnist": 0.91, "mnist": 0.99}[name]
    assert (SHIPPED_FOLDER / f"{pretrained.CLASSIFIER}{name}.pt").stat().st_size <= 500_000
    assert all(w.isfinite().all() for w in model.state_dict().values())
    assert set(CLASSIFIERS) == set(make.CLASSIFIERS) == {"fashion_mnist", "mnist"}


def test_a_classifier_is_no_diffusion_network(shelf, tiny, net):
    put_classifier(pretrained.FOLDER, "mnist")
    assert pretrained.names() == [] and pretrained.classifier_names() == ["mnist"]
    assert pretrained.matching(tiny()) is None
    shelf("small", tiny(), net(tiny()))
    assert pretrained.names() == ["small"] and pretrained.matching(tiny()) == "small"


def test_load_classifier_names_what_there_is_and_refuses_damage(shelf):
    model = put_classifier(pretrained.FOLDER, "mnist")
    assert equal(pretrained.load_classifier("mnist"), model)
    with pytest.raises(FileNotFoundError, match="'classifier_digits': there are classifier_mnist"):
        pretrained.load_classifier("digits")
    (pretrained.FOLDER / "classifier_mnist.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="classifier_mnist.pt is damaged"):
        pretrained.load_classifier("mnist")


def test_obtain_classifier_takes_the_shipped_one_only_for_its_own_images(
    shelf, monkeypatch, capsys
):
    shipped = put_classifier(pretrained.FOLDER, "mnist")
    images, labels = torch.zeros(4, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1, 2, 3])
    mnist = data.ImageSet(images, labels, data.DIGITS, data.TITLES["mnist"], "here")
    monkeypatch.setattr(pretrained, "train_classifier", lambda *args, **kwargs: "trained")
    assert equal(pretrained.obtain_classifier(mnist), shipped)
    (line,) = capsys.readouterr().out.splitlines()
    assert line == "classifier: shipped with the package, right on 90.00% of MNIST's test set"
    wide = data.ImageSet(images[..., 2:], labels, data.DIGITS, data.TITLES["mnist"], "here")
    other = data.ImageSet(images, labels, data.DIGITS, data.TITLES["fashion_mnist"], "here")
    for train_set, said in ((wide, "MNIST of 28×26"), (other, "Fashion-MNIST of 28×28")):
        assert pretrained.obtain_classifier(train_set) == "trained"
        (line,) = capsys.readouterr().out.splitlines()
        assert "none is shipped" in line and f"{said}; training one now on 4 images" in line


def test_without_any_data_set_a_classifier_of_the_digits_is_trained_in_seconds(capsys):
    state = torch.get_rng_state()
    train_set = data.load_images("digits", say=False)
    test_set = data.load_images("digits", "test", say=False)
    model = pretrained.obtain_classifier(train_set)
    assert accuracy(model, test_set) >= 0.9 and not model.training
    assert "training one now on 1,500 images" in capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), state), (
        "training a classifier moved the global generator"
    )


def test_make_writes_a_classifier_that_loads(shelf, monkeypatch):
    digits = data.load_images("digits", say=False).first(300)
    monkeypatch.setattr(make, "FOLDER", pretrained.FOLDER)
    monkeypatch.setattr(make, "_real_images", lambda dataset: (digits, digits))
    monkeypatch.setitem(make.CLASSIFIERS, "mnist", {"epochs": 3, "shift": 0})
    assert make.make_classifier("mnist").name == "classifier_mnist.json"
    model = pretrained.load_classifier("mnist")
    assert pretrained.card("classifier_mnist")["test_accuracy"] == round(accuracy(model, digits), 4)


def test_make_writes_weights_and_trains_them_further(shelf, tiny, monkeypatch):
    """Further passes start from the weights that are there, and the card adds them up."""
    digits = data.load_images("digits", image_size=8, say=False).first(40)
    cfg = tiny(epochs=1)
    monkeypatch.setattr(make, "FOLDER", pretrained.FOLDER)
    monkeypatch.setattr(make, "_real_images", lambda dataset: (digits, digits))
    monkeypatch.setitem(make.RECIPES, "small", cfg)
    make.make("small")
    first, card = pretrained.load("small")[0], pretrained.card("small")
    # passes of no effect leave the weights as they are, so these are where the run starts
    monkeypatch.setitem(make.RECIPES, "small", cfg.replace(lr=2e-6, warmup_steps=1000))
    make.make("small", further=2)
    second, more = pretrained.load("small")[0], pretrained.card("small")
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert not torch.equal(a, b) or not a.abs().sum()
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    assert more["config"] == card["config"] and more["minutes"] >= card["minutes"]
    assert [(run["epochs"], run["seed"]) for run in more["further"]] == [(2.0, 1)]
    make.make("small", further=1)
    assert [run["seed"] for run in pretrained.card("small")["further"]] == [1, 2]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["mnist", "minst"], "there is no 'minst'"),
        (["classifier_mnist", "--further", "1"], "--further trains diffusion networks only"),
    ],
)
def test_the_command_checks_every_name_first(arguments, complaint, monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(make, "make", lambda *asked: trained.append(asked))
    monkeypatch.setattr(make, "make_classifier", trained.append)
    with pytest.raises(SystemExit):
        make.main(arguments)
    assert complaint in capsys.readouterr().err
    assert not trained
    make.main(["mnist", "--further", "2"])
    make.main(["classifier_mnist"])
    assert trained == [("mnist", 2.0), "mnist"]


def test_no_weights_are_made_from_other_images_than_their_name_says(own_folders, monkeypatch):
    monkeypatch.setattr(data, "_from_folders", lambda dataset, split: None)
    with pytest.raises(FileNotFoundError, match="mnist was not found"):
        make._real_images("mnist")
